"""The losses that are registered: those of other packages for the tests, and the inputs of each."""

from __future__ import annotations

import functools
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest

import rankloss_trainers
from rankloss.losses import TEACHER
from rankloss.losses.composition import call_arguments
from rankloss_trainers import catalog

NAMES = tuple(catalog.known())
"""Every registered loss: rankloss's own, the baselines while they are installed, and the tests' tiny ones."""
OF_PACKAGES = tuple(name for name in NAMES if catalog.package_of(name))
"""Those that a package registers as an entry point."""


@functools.cache
def input_names(name: str) -> tuple[str, ...]:
    """The inputs of a registered loss: those its modules demand, and a teacher's features."""
    named, loss = catalog.load(name), rankloss_trainers.create(name)
    names = dict.fromkeys(("image_features", "text_features", "logit_scale"))
    if named.teacher is not None:
        names.update(dict.fromkeys(TEACHER))
    if named.kind == "sigmoid":
        names["logit_bias"] = None
    if any(getattr(part, "same_id", None) for part in loss.modules()):
        names["pair_ids"] = None
    for part in loss.modules():
        for key, parameter in call_arguments(part).items():
            is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if is_named and parameter.default is parameter.empty:
                names[key] = None
    return tuple(names)


def register(patch: pytest.MonkeyPatch, **losses: Any) -> None:
    """Register losses as a package p 1.0: their callables, or references to these."""
    found: dict[str, Any] = dict(catalog.known())
    for name, loss in losses.items():
        load = functools.partial(pkgutil.resolve_name, loss) if isinstance(loss, str) else lambda x=loss: x
        dist = SimpleNamespace(name="p", version="1.0")
        found[name] = (SimpleNamespace(name=name, value=f"x:{name}", dist=dist, load=load),)
    patch.setattr(catalog, "known", lambda: found)
