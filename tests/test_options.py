"""Every option of the rank terms has one place, and is checked there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from drawn_options import FIELDS, small_values
from rankloss.options import CHOICES, RankOptions

# FIELDS has the dataclass fields of RankOptions by name, CHOICES what an option that is a choice may be.
LARGEST_INT32 = 2**31 - 1
NUMBERS = [name for name, field in FIELDS.items() if "above" in field.metadata]
"""Options that are a positive number."""
NAMED = [name for name in FIELDS if CHOICES[name]]
"""Options that are one of some choices."""
COUNTS = [name for name in FIELDS if name not in (*NAMED, *NUMBERS)]
"""Options that are an integer, or may be None instead."""


@given(st.fixed_dictionaries({}, optional={name: small_values(name) for name in FIELDS}))
def test_every_option_is_kept(chosen: dict[str, Any]) -> None:
    try:
        options = RankOptions(**chosen)
    except ValueError:  # some exclude each other, see below
        assume(False)
    values = {name: getattr(options, name) for name in FIELDS}
    assert values == {name: chosen.get(name, field.default) for name, field in FIELDS.items()}
    assert RankOptions(**options.changed) == options  # `changed` has those that differ from the defaults


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_is_documented(name: str) -> None:
    assert f"    {name}: " in (RankOptions.__doc__ or "")


BAD = [(name, value) for name in NAMED for value in ("x", 0, 1, 1.0)]
BAD += [(name, value) for name in COUNTS for value in (-1, 2.0, True, "8", 2**70, float("nan"))]
BAD += [
    (name, value) for name in NUMBERS for value in (0, -1.0, True, "8", float("nan"), float("inf"), [1.0])
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_that_an_option_does_not_take_is_refused_by_name(name: str, value: object) -> None:
    needed = "(one of|an integer|a finite number|at most) .*"
    with pytest.raises(ValueError, match=rf"^{name} must be {needed}got {re.escape(repr(value))}$"):
        RankOptions(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_bounds_of_a_count_are_inclusive(name: str) -> None:
    least, largest = bounds_of(name)
    for value in (least, largest):
        assert getattr(with_count(name, value), name) == value
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least {least}.* {least - 1}$"):
        with_count(name, least - 1)
    with pytest.raises(ValueError, match=f"{name} must be at most {largest}.* {largest + 1}$"):
        with_count(name, largest + 1)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_numpy_is_kept_as_pythons(name: str) -> None:
    count = getattr(with_count(name, np.int64(64)), name)
    assert (count, type(count)) == (64, int)


def bounds_of(name: str) -> tuple[int, int]:
    """The least and the largest value of a count, as its field declares them."""
    bounds = FIELDS[name].metadata
    return bounds.get("at_least", 1), bounds.get("at_most", LARGEST_INT32)


def with_count(name: str, value: Any) -> RankOptions:
    """Options with a count, and the method that it needs."""
    needed: dict[str, Any] = {"method": "bin"} if name == "bins" else {}
    return RankOptions(**needed, **{name: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bins": 3}, "bins=3 needs method='bin'.* method='sort'"),
        ({"bins": 3, "method": "sort"}, "bins=3 needs method='bin'.* method='sort'"),
        ({"reference_scale": 2.0}, "reference_scale=2.0 needs model='top_one'.* model='plackett_luce'"),
        ({"model": "top_one", "top_k": 4}, "model='top_one' needs top_k=None.* top_k=4"),
        ({"model": "top_one", "method": "bin"}, "model='top_one' needs method='sort'.* method='bin'"),
    ],
)
def test_options_that_exclude_each_other_are_an_error_that_names_both(options, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RankOptions(**options)
