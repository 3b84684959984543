"""Calls counted, for the tests: how often a run builds a loss, or opens a folder."""

from __future__ import annotations

import functools
import pkgutil
from collections import Counter
from typing import Any

import pytest


def count_calls(patch: pytest.MonkeyPatch, **paths: str) -> Counter[str]:
    """From now on, the calls of functions and methods, which are named by their paths."""
    calls: Counter[str] = Counter()

    def count(key: str, path: str) -> None:
        original = pkgutil.resolve_name(path)

        @functools.wraps(original)
        def counted(*args: Any, **keywords: Any) -> Any:
            calls[key] += 1
            return original(*args, **keywords)

        patch.setattr(path, counted)

    for key, path in paths.items():
        count(key, path)
    return calls


LOSSES_AND_FOLDERS = {
    "choose": "rankloss_trainers.catalog.choose_each",
    "build": "rankloss_trainers.declared.Loss.build",
    "open": "rankloss_features.Features.__init__",
}
