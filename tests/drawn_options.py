"""Options of the rank terms, read from their fields: drawn by hypothesis, or one at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from rankloss.options import CHOICES, RankOptions

FIELDS = {f.name: f for f in fields(RankOptions)}
OTHERS_NEEDED: list[dict[str, Any]] = [{}]
"""What an option may need beside it: nothing, or a choice of another option."""
OTHERS_NEEDED += [{name: value} for name in FIELDS for value in CHOICES[name]]


def any_options(options: RankOptions) -> bool:
    """True for all."""
    return True


def together(chosen: dict[str, Any], accepts: Callable[[RankOptions], bool] = any_options) -> dict[str, Any]:
    """Of these options those that go together and are accepted, each with the other option that it needs."""
    options: dict[str, Any] = {}
    for name, value in chosen.items():
        if name not in options:  # as what another one needed
            options = _added(options, name, value, accepts)
    return options


def _added(
    options: dict[str, Any], name: str, value: Any, accepts: Callable[[RankOptions], bool]
) -> dict[str, Any]:
    """The options with one more and what it needs, or as they are where it excludes one of them."""
    for needed in OTHERS_NEEDED:
        candidate = {**needed, **options, name: value}
        with suppress(ValueError):
            if accepts(RankOptions(**candidate)):
                return candidate
    return options


def small_values(name: str) -> st.SearchStrategy[Any]:
    """All choices of an option, or small numbers."""
    if CHOICES[name]:
        return st.sampled_from(CHOICES[name])
    bounds = FIELDS[name].metadata
    return st.just(3.0) if "above" in bounds else st.integers(bounds.get("at_least", 1), 12)


def options(accepts: Callable[[RankOptions], bool] = any_options) -> st.SearchStrategy[dict[str, Any]]:
    """Options that go together and are accepted, with small numbers; torch's kernel."""
    drawn = {name: small_values(name) for name in FIELDS if name != "kernel"}
    return st.fixed_dictionaries({}, optional=drawn).map(lambda chosen: together(chosen, accepts))


def is_streamed(x: RankOptions) -> bool:
    """True for lists in linear memory."""
    return x.reduction != "none"


def _other_values(name: str) -> list[Any]:
    """All choices but the default, or 3 for a number."""
    return [value for value in CHOICES[name] or (3,) if value != FIELDS[name].default]


CHANGES: list[dict[str, Any]] = [
    together({name: value}) for name in FIELDS if name != "kernel" for value in _other_values(name)
]
"""Every option alone, with what it needs."""


def with_teachers(options: list[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """Each with and without a teacher, where it goes with one and without."""
    without_teacher = [(x, False) for x in options if x.get("reference_scale") is None]
    with_teacher = [(x, True) for x in options if x.get("fixed_reference") is None]
    return [*without_teacher, *with_teacher]
