"""The losses that are registered: those of other packages for the tests, and the inputs of each."""

from __future__ import annotations

import functools
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rankloss_trainers
from rankloss.losses import TEACHER
from rankloss.losses.composition import call_arguments
from rankloss_trainers import catalog

TINY_PACKAGE = Path(__file__).parent / "tiny_package"
"""A package with losses for the tests, which an interpreter of its own needs on its path."""
NAMES = tuple(catalog.known())
"""Every registered loss: rankloss's own, the baselines while they are installed, and the tests' tiny ones."""
OF_PACKAGES = tuple(name for name in NAMES if catalog.package_of(name))
"""Those that a package registers as an entry point."""


@functools.cache
def input_names(name: str) -> tuple[str, ...]:
    """The inputs of a registered loss: those its modules demand, and a teacher's features."""
    named, loss = catalog.load(name), rankloss_trainers.create(name)
    names = ["image_features", "text_features", "logit_scale"]
    if named.teacher is not None:
        names += TEACHER
    if named.kind == "sigmoid":
        names.append("logit_bias")
    if any(getattr(part, "same_id", None) for part in loss.modules()):
        names.append("pair_ids")
    for part in loss.modules():
        for argument, parameter in call_arguments(part).items():
            is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if is_named and parameter.default is parameter.empty:
                names.append(argument)
    return tuple(dict.fromkeys(names))  # each once, in their order


def register(patch: pytest.MonkeyPatch, **losses: Any) -> None:
    """Register losses as a package p 1.0: their callables, or references to these."""
    entry_points: dict[str, Any] = dict(catalog.known())
    for name, loss in losses.items():
        entry_points[name] = (_entry_point(name, loss),)
    patch.setattr(catalog, "known", lambda: entry_points)


def _entry_point(name: str, loss: Any) -> SimpleNamespace:
    """What the catalogue reads of an entry point, which loads the loss."""

    def load() -> Any:
        return pkgutil.resolve_name(loss) if isinstance(loss, str) else loss

    package = SimpleNamespace(name="p", version="1.0")
    return SimpleNamespace(name=name, value=f"x:{name}", dist=package, load=load)
