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


def first_equal(features: Tensor) -> list[int]:
    return equal_rows.first_equal(features.to(DEVICE)).tolist()


def by_definition(features: Tensor) -> list[int]:
    """The rule of Python's floats, in which −0.0 equals 0.0 and NaN nothing."""
    rows = features.tolist()
    return [next((j for j in range(i) if rows[j] == rows[i]), i) for i in range(len(rows))]


@settings(max_examples=50)
@given(
    st.integers(1, 3).flatmap(
        lambda d: st.lists(st.lists(ENTRIES, min_size=d, max_size=d), min_size=1, max_size=9)
    )
)
def test_the_first_equal_row_is_that_of_the_definition(rows: list[list[float]]) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    assert first_equal(x) == by_definition(x)


@pytest.mark.parametrize("width", [1, 256, 257, 600])
def test_more_rows_and_columns_than_a_program_takes_at_a_time(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2 if width == 1 else 5, (150, width), generator=generator).float()
    x[[149, 70, 3]] = x[[1, 1, 1]]
    assert first_equal(x) == by_definition(x)
    wide = torch.cat([x, torch.full((150, 3), math.nan)], 1)[:, :width]  # rows a stride apart
    assert first_equal(wide) == by_definition(x)


def test_rows_with_one_hash_that_differ_are_not_equal() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]], device=DEVICE)
    assert confirm_equals(x, torch.zeros(3, dtype=torch.int64, device=DEVICE)).tolist() == [0, 1, 0]


def test_an_entry_that_differs_changes_the_hash() -> None:
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).repeat(41, 1)
    x[range(1, 41), range(40)] *= -1
    assert len(hash_rows(x.to(DEVICE)).unique()) == 41
