"""Options of the rank terms, read from their fields: drawn by hypothesis, or one at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from rankloss.options import CHOICES, RankOptions

FIELDS = {f.name: f for f in fields(RankOptions)}
_NEEDED = [{}, *({name: value} for name in FIELDS for value in CHOICES[name])]


def together(chosen: dict[str, Any], accepts: Callable[[RankOptions], bool] = bool) -> dict[str, Any]:
    """Of these options those that go together, each with the other option that it needs."""
    found: dict[str, Any] = {}
    for name, value in chosen.items():
        for needed in _NEEDED if name not in found else ():
            more = {**needed, **found, name: value}
            with suppress(ValueError):
                if accepts(RankOptions(**more)):
                    found = more
                    break
    return found


def small_values(name: str) -> st.SearchStrategy[Any]:
    if CHOICES[name]:
        return st.sampled_from(CHOICES[name])
    bounds = FIELDS[name].metadata
    return st.just(3.0) if "above" in bounds else st.integers(bounds.get("at_least", 1), 12)


def options(accepts: Callable[[RankOptions], bool] = bool) -> st.SearchStrategy[dict[str, Any]]:
    """Options in which the accepted ones go together, with small numbers; torch's kernel."""
    drawn = {name: small_values(name) for name in FIELDS if name != "kernel"}
    return st.fixed_dictionaries({}, optional=drawn).map(lambda chosen: together(chosen, accepts))


def is_streamed(x: RankOptions) -> bool:
    """True for lists in linear memory."""
    return x.reduction != "none"


CHANGES: list[dict[str, Any]] = [
    together({name: value})
    for name, field in FIELDS.items()
    for value in CHOICES[name] or (3,)
    if name != "kernel" and value != field.default
]
"""Every option alone, with what it needs: all choices but the default, and of numbers 3."""


def with_teachers(options: list[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """Each with and without a teacher, where it goes with one and without."""
    return [
        (x, has_teacher)
        for x in options
        for has_teacher in (False, True)
        if x.get("fixed_reference" if has_teacher else "reference_scale") is None
    ]
