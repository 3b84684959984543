from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankloss import schedules

# The value of each schedule at the end of a training.
ENDS = {"rankclip": 2.0, "official": 2.0, "constant": 1.0, "linear": 1.0, "cosine": 1.0}
every = pytest.mark.parametrize("name", ENDS)


@st.composite
def positions(draw: st.DrawFn) -> tuple[int, int]:
    """An epoch or step i, and the number n of them."""
    n = draw(st.integers(1, 500))
    return draw(st.integers(1, n)), n


@given(positions())
def test_rankclip_is_the_papers_formula(position: tuple[int, int]) -> None:
    """min(max((3i − 1)/(n − 1), 0), 2); a training of one step is at its end."""
    i, n = position
    printed = (3 * i - 1) / (n - 1) if n > 1 else math.inf
    expected = min(max(printed, 0), 2)
    assert schedules.rankclip(i, n) == pytest.approx(expected, rel=1e-15)


def test_official_is_the_formula_of_the_authors_code_in_the_64_epochs_of_their_recipe() -> None:
    """min(3·(i − 1)/63, 2)."""
    for i, expected in [(1, 0), (2, 1 / 21), (22, 1), (43, 2), (64, 2)]:
        assert schedules.official(i, 64) == pytest.approx(expected)


def test_official_in_ten_epochs_is_a_ramp_of_thirds() -> None:
    """min(3·(i − 1)/9, 2)."""
    values = [schedules.official(i, 10) for i in range(1, 11)]
    assert values == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 2, 2, 2])


def test_the_tests_have_every_schedule() -> None:
    assert set(ENDS) == set(schedules.NAMES)


@every
@given(position=positions())
def test_every_schedule_is_finite_never_negative_and_never_falls(
    name: str, position: tuple[int, int]
) -> None:
    schedule, (i, n) = schedules.by_name(name), position
    next_i = min(i + 1, n)
    assert 0 <= schedule(i, n) <= schedule(next_i, n) < math.inf


@every
@pytest.mark.parametrize("n", [1, 2, 10])
def test_every_schedule_ends_at_its_end_value_also_where_there_is_one_step_only(name: str, n: int) -> None:
    assert schedules.by_name(name)(n, n) == pytest.approx(ENDS[name], rel=1e-15)


@every
@pytest.mark.parametrize(("i", "n"), [(0, 5), (6, 5), (-1, 5), (1, 0), (1.5, 5), (1, 5.0), ("1", 5)])
def test_positions_outside_training_are_refused(name: str, i: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"a schedule needs integers 1 <= i <= n.* i={i!r}, n={n!r}"):
        schedules.by_name(name)(i, n)


@pytest.mark.parametrize("name", ["step", 3, None, ["rankclip"]])
def test_an_unknown_name_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=f"schedule must be one of 'rankclip'.*{re.escape(repr(name))}"):
        schedules.by_name(name)  # type: ignore[arg-type]


@every
def test_small_integers_do_not_wrap(name: str) -> None:
    """3·100, which a formula computes, does not fit NumPy's eight bits: it would wrap to 44."""
    schedule = schedules.by_name(name)
    assert schedule(np.uint8(100), np.uint8(200)) == schedule(100, 200)
