"""Losses of another package, for the tests."""

from __future__ import annotations

import functools
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest

from rankloss_trainers import catalog


def register(patch: pytest.MonkeyPatch, **losses: Any) -> None:
    """Register losses as a package p 1.0: their callables, or references to these."""
    found: dict[str, Any] = dict(catalog.known())
    for name, loss in losses.items():
        load = functools.partial(pkgutil.resolve_name, loss) if isinstance(loss, str) else lambda x=loss: x
        dist = SimpleNamespace(name="p", version="1.0")
        found[name] = (SimpleNamespace(name=name, value=f"x:{name}", dist=dist, load=load),)
    patch.setattr(catalog, "known", lambda: found)
