from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankloss import batch
from rankloss.batch import first_occurrence


@given(st.lists(st.tuples(*[st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0**-20])] * 3), min_size=1, max_size=12))
def test_first_occurrence_is_the_index_of_the_first_equal_row(rows: list[tuple[float, ...]]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert first_occurrence(torch.tensor(rows, dtype=dtype)).tolist() == [rows.index(r) for r in rows]


def test_a_row_with_nan_equals_no_row() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, torch.nan], [2.0, 3.0], [2.0, 3.0]])
    assert first_occurrence(x).tolist() == [0, 1, 2, 2]


def test_rows_whose_hashes_collide_are_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_mix", torch.zeros_like)
    assert first_occurrence(torch.tensor([[1.0], [2.0], [1.0]])).tolist() == [0, 1, 0]


def test_many_random_rows_have_no_false_match_and_all_true_ones() -> None:
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[2000:] = x[:1000]
    expected = torch.arange(3000)
    expected[2000:] = torch.arange(1000)
    assert torch.equal(first_occurrence(x), expected)
