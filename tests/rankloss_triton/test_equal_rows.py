"""The kernels that find equal rows, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import DEVICE
from rankloss_triton import equal_rows
from rankloss_triton.equal_rows import confirm_equals, hash_rows

ENTRIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.25, math.nan, math.inf])


def by_kernels(features: Tensor) -> list[int]:
    """The place of the first row that equals each row, found by the kernels on the device."""
    return equal_rows.first_equal(features.to(DEVICE)).tolist()


def by_definition(features: Tensor) -> list[int]:
    """The rule of Python's floats, in which −0.0 equals 0.0 and NaN nothing."""
    rows = features.tolist()
    firsts = []
    for place, row in enumerate(rows):
        equal_before = [earlier for earlier in range(place) if rows[earlier] == row]
        firsts.append(equal_before[0] if equal_before else place)
    return firsts


@st.composite
def short_rows(draw: st.DrawFn) -> Tensor:
    """A few rows of a few entries, of which many are equal."""
    width = draw(st.integers(1, 3))
    row = st.lists(ENTRIES, min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=9)), dtype=torch.float32)


@settings(max_examples=50)
@given(short_rows())
def test_the_first_equal_row_is_that_of_the_definition(features: Tensor) -> None:
    assert by_kernels(features) == by_definition(features)


def many_rows(width: int) -> Tensor:
    """More rows than a program takes at a time, some of which are equal."""
    generator = torch.Generator().manual_seed(0)
    different_entries = 2 if width == 1 else 5
    rows = torch.randint(different_entries, (150, width), generator=generator).float()
    rows[[149, 70, 3]] = rows[1].clone()  # some in each program, of 64 rows when interpreted
    return rows


# A program takes 256 columns at a time.
widths = pytest.mark.parametrize("width", [1, 256, 257, 600])


@widths
def test_more_rows_and_columns_than_a_program_takes_at_a_time(width: int) -> None:
    assert by_kernels(many_rows(width)) == by_definition(many_rows(width))


@widths
def test_rows_may_be_a_stride_apart(width: int) -> None:
    rows = many_rows(width)
    wider = torch.cat([rows, torch.full((150, 3), math.nan)], 1)  # NaN, if it were read, would equal nothing
    columns_of_wider = wider[:, :width]
    assert by_kernels(columns_of_wider) == by_definition(rows)


def test_rows_with_one_hash_that_differ_are_not_equal() -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]], device=DEVICE)
    candidates = torch.zeros(3, dtype=torch.int64, device=DEVICE)  # as if all had the first row's hash
    assert confirm_equals(rows, candidates).tolist() == [0, 1, 0]


def test_an_entry_that_differs_changes_the_hash() -> None:
    entries = 40
    row = torch.randn(entries, generator=torch.Generator().manual_seed(0))
    with_one_sign_changed = row * (1 - 2 * torch.eye(entries))  # a row for each entry
    rows = torch.cat([row[None], with_one_sign_changed])
    assert len(hash_rows(rows.to(DEVICE)).unique()) == 1 + entries
