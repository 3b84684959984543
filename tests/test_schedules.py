from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankloss import schedules


@st.composite
def positions(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 500))
    return draw(st.integers(1, n)), n


@given(positions())
def test_rankclip_is_the_papers_formula(position: tuple[int, int]) -> None:
    i, n = position
    expected = 2.0 if n == 1 else min(max((3 * i - 1) / (n - 1), 0), 2)
    assert schedules.rankclip(i, n) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("i", "expected"), [(1, 0.0), (2, 0.047619), (22, 1.0), (43, 2.0), (64, 2.0)])
def test_official_is_what_the_authors_code_computes_over_64_epochs(i: int, expected: float) -> None:
    assert schedules.official(i, 64) == pytest.approx(expected, abs=1e-6)


def test_official_over_ten_epochs() -> None:
    values = [schedules.official(i, 10) for i in range(1, 11)]
    assert values == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 2, 2, 2])


@pytest.mark.parametrize("name", schedules.NAMES)
@given(position=positions())
def test_every_schedule_is_finite_never_negative_and_never_falls(
    name: str, position: tuple[int, int]
) -> None:
    schedule, (i, n) = schedules.by_name(name), position
    value = schedule(i, n)
    assert math.isfinite(value)
    assert value >= 0
    assert value <= schedule(min(i + 1, n), n)


@pytest.mark.parametrize(
    ("name", "end"), [("rankclip", 2), ("official", 2), ("constant", 1), ("linear", 1), ("cosine", 1)]
)
def test_every_schedule_ends_at_its_end_value_also_where_there_is_one_step_only(
    name: str, end: float
) -> None:
    for n in (1, 2, 10):
        assert schedules.by_name(name)(n, n) == pytest.approx(end, rel=1e-15)


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize(("i", "n"), [(0, 5), (6, 5), (-1, 5), (1, 0), (1.5, 5), (1, 5.0), ("1", 5)])
def test_positions_outside_training_are_refused(name: str, i: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"integers 1 <= i <= n; got i={i!r}, n={n!r}"):
        schedules.by_name(name)(i, n)


def test_an_unknown_name_is_refused() -> None:
    for name in ("step", 3, None, ["rankclip"]):
        with pytest.raises(ValueError, match=r"schedule must be one of 'rankclip', .*; got "):
            schedules.by_name(name)


def test_small_integers_do_not_wrap() -> None:
    for name in schedules.NAMES:
        schedule = schedules.by_name(name)
        assert schedule(np.uint8(100), np.uint8(200)) == schedule(100, 200)
