from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankloss import batch
from rankloss.batch import Batch, first_equal, first_occurrence, row_hashes

# --- equal rows -----------------------------------------------------------------------------------------

single_or_double = st.sampled_from([torch.float32, torch.float64])
# So few values that rows repeat; Python's lists and sets, the oracles, take −0.0 and 0.0 for equal, too.
entries = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0**-20])
few_rows = st.lists(st.tuples(entries, entries, entries), min_size=1, max_size=12)


@given(few_rows, single_or_double)
def test_first_occurrence_is_the_index_of_the_first_equal_row(rows: list, dtype: torch.dtype) -> None:
    assert first_occurrence(torch.tensor(rows, dtype=dtype)).tolist() == [rows.index(row) for row in rows]


@given(few_rows, single_or_double)
def test_first_equal_is_none_where_no_two_rows_are_equal(rows: list, dtype: torch.dtype) -> None:
    all_differ = len({*rows}) == len(rows)
    assert (first_equal(torch.tensor(rows, dtype=dtype)) is None) == all_differ


def test_a_row_with_nan_equals_no_row() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, torch.nan], [2.0, 3.0], [2.0, 3.0]])
    assert first_occurrence(x).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU", "accelerator"])
def test_many_random_rows_have_no_false_match_and_all_true_ones(
    is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, and by the code for accelerators, where reading a value would wait for the device."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[2000:] = x[:1000]  # the first 2,000 rows differ from each other
    assert torch.equal(first_occurrence(x), torch.cat([torch.arange(2000), torch.arange(1000)]))


def test_rows_whose_hashes_collide_are_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "row_hashes", lambda x: torch.zeros(len(x), dtype=torch.int64))
    assert first_occurrence(torch.tensor([[1.0], [2.0], [1.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_alike_have_hashes_of_their_own(dtype: torch.dtype) -> None:
    """Rows that differ in signs alone, and rows that hold the same entries elsewhere."""
    row = torch.randn(16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    one_hot = torch.eye(16, dtype=dtype)[0]
    bits_of_numbers = torch.arange(2**9)[:, None] >> torch.arange(16) & 1  # [512, 16]: 0 or 1
    other_signs = (1 - 2 * bits_of_numbers) * row  # a bit of 1 changes an entry's sign
    shifted = torch.stack([x.roll(places) for places in range(16) for x in (row, one_hot)])
    for rows in (other_signs, shifted):
        assert len(row_hashes(rows).unique()) == len(rows)


def test_subnormal_entries_hash_the_same_whether_or_not_they_are_flushed() -> None:
    x = torch.tensor([[1e-40, 1.0], [1e-40, 1.0], [0.0, 1.0]])
    hashes = row_hashes(x)
    assert torch.set_flush_denormal(True), "this CPU cannot flush"
    try:
        assert torch.equal(row_hashes(x), hashes)
    finally:
        torch.set_flush_denormal(False)


def test_rows_hash_the_same_wherever_their_entries_lie_in_memory() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    column_by_column = x.t().contiguous().t()
    assert torch.equal(row_hashes(column_by_column), row_hashes(x))


# --- a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_dtype", "text_dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_a_number_as_scale_has_the_digits_of_the_wider_features(
    image_dtype: torch.dtype, text_dtype: torch.dtype
) -> None:
    scale = 1 / 0.07  # which float32 rounds
    batch = Batch.of(torch.eye(2, dtype=image_dtype), torch.eye(2, dtype=text_dtype), scale)
    assert batch.inputs.scale.item() == scale
    assert {x.dtype for x in batch.inputs if x is not None} == {torch.float64}


def test_a_teacher_has_no_graph_and_the_dtype_of_the_features() -> None:
    image_features = text_features = torch.eye(4, 3)
    teacher_of_images = torch.eye(4).bfloat16().requires_grad_()
    batch = Batch.of(image_features, text_features, 1.0, teacher=(teacher_of_images, None))
    reference = batch.teacher["text"]  # a teacher of one modality ranks both
    assert not reference.requires_grad
    assert reference.dtype == torch.float32
