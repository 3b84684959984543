from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import random_batch
from fake_cuda import fake_cuda
from rankloss import equal_rows
from rankloss.batch import Batch
from rankloss.checks import check_features
from rankloss.equal_rows import first_occurrence, row_hashes
from rankloss.operator import weighted_terms
from rankloss.options import RankOptions


@given(st.lists(st.tuples(*[st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0**-20])] * 3), min_size=1, max_size=12))
def test_first_occurrence_is_the_index_of_the_first_equal_row(rows: list[tuple[float, ...]]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert first_occurrence(torch.tensor(rows, dtype=dtype)).tolist() == [rows.index(r) for r in rows]


def test_a_row_with_nan_equals_no_row() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, torch.nan], [2.0, 3.0], [2.0, 3.0]])
    assert first_occurrence(x).tolist() == [0, 1, 2, 2]


def test_rows_whose_hashes_collide_are_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_rows, "row_hashes", lambda x, salt=0: torch.zeros(len(x), dtype=torch.int64))
    assert first_occurrence(torch.tensor([[1.0], [2.0], [1.0]])).tolist() == [0, 1, 0]


def test_many_random_rows_have_no_false_match_and_all_true_ones() -> None:
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[2000:] = x[:1000]
    expected = torch.arange(3000)
    expected[2000:] = torch.arange(1000)
    assert torch.equal(first_occurrence(x), expected)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@dtypes
@given(
    codes=st.lists(st.integers(0, 2**9 - 1), min_size=1, max_size=40),
    row=st.lists(st.floats(0.5, 2, width=32), min_size=9, max_size=9),
)
def test_rows_that_differ_in_signs_alone_are_told_apart(dtype, codes: list[int], row: list[float]) -> None:
    signs = 1 - 2 * (torch.tensor(codes)[:, None] >> torch.arange(9) & 1)
    x = signs * torch.tensor(row, dtype=dtype)
    assert first_occurrence(x).tolist() == [codes.index(c) for c in codes]
    assert len(row_hashes(x).unique()) == len(set(codes))  # which no collision has to put right


@dtypes
def test_minus_x_x_x(dtype: torch.dtype) -> None:
    x = torch.randn(8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert first_occurrence(torch.stack([-x, x, x])).tolist() == [0, 1, 1]


@pytest.mark.parametrize(("looks", "expected"), [(True, [0, 1, 1, 0, 4, 4]), (False, [0, 1, 2, 0, 4, 5])])
def test_rows_after_a_collision_tie_with_their_equals_if_a_look_is_free_and_never_with_others(
    looks: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = equal_rows.row_hashes
    # In the first round all rows collide.
    monkeypatch.setattr(equal_rows, "row_hashes", lambda x, salt=0: original(x, salt) * (salt > 0))
    monkeypatch.setattr(equal_rows, "may_look_at", lambda x: looks)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0], [5.0, 6.0]])
    assert first_occurrence(x).tolist() == expected


def test_without_a_look_equal_rows_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_rows, "may_look_at", lambda x: False)
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[2000:] = x[:1000]
    assert torch.equal(first_occurrence(x), torch.cat([torch.arange(2000), torch.arange(1000)]))


def test_subnormal_entries_hash_the_same_whether_or_not_they_are_flushed() -> None:
    x = torch.tensor([[1e-40, 1.0], [1e-40, 1.0], [0.0, 1.0]])
    plain = row_hashes(x)
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(row_hashes(x), plain)
    finally:
        torch.set_flush_denormal(False)


# --- checks -----------------------------------------------------------------------------------------------


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"image_features must be a torch.Tensor; got numpy.ndarray"):
        check_features(np.ones((3, 4), np.float32), torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"text_features must be a torch.Tensor; got list"):
        check_features(torch.ones(3, 4), [[1.0]])


@pytest.mark.parametrize("lists", ["row", "batch"])
def test_tensors_on_two_devices_are_named_and_never_a_number(lists: str) -> None:
    v, t, s = random_batch(0, 4, 3, 10.0).leaves()
    options, weights = RankOptions(lists=lists), torch.ones(3, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="text_features must be on the device of image_features, cpu; got meta"
    ):
        Batch.of(v, t.to("meta"), s)
    with pytest.raises(ValueError, match=r"text_features .* image_features, meta; got cpu"):
        Batch.of(v.to("meta"), t, s)
    with pytest.raises(ValueError, match=r"image_anchors must be on the device .* cpu; got meta"):
        Batch.of(v, t, s, image_anchors=v.to("meta"), text_anchors=t)
    with pytest.raises(ValueError, match="logit_scale must be on cpu, as image_features; got meta"):
        Batch.of(v, t, s.to("meta"))
    with pytest.raises(ValueError, match="weights must be on cpu, as the features; got meta"):
        weighted_terms(Batch.of(v, t, s), options, weights.to("meta"))
    of_meta = weighted_terms(Batch.of(v.to("meta"), t.to("meta"), s), options, weights)
    assert all(x.is_meta and x.shape == () for x in of_meta)
    with torch.device("meta"):  # a default device, while the features are real
        value = weighted_terms(Batch.of(v, t, 10.0), options, weights)
    for a, b in zip(value, weighted_terms(Batch.of(v, t, s), options, weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", ["ten", None, [1.0, 2.0]])
def test_a_scale_that_is_no_number_is_shown(scale) -> None:
    with pytest.raises(TypeError, match=r"logit_scale must be a float or a torch.Tensor; got "):
        Batch.of(torch.eye(2), torch.eye(2), scale)


@pytest.mark.parametrize("scale", [Fraction(10), Decimal(10), np.array(10.0)])
def test_a_number_that_torch_does_not_multiply_by_is_refused(scale) -> None:
    with pytest.raises(TypeError, match=r"logit_scale must be a float or a torch.Tensor; got \w+\.\w+"):
        Batch.of(torch.eye(2), torch.eye(2), scale)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_scale_that_is_a_number_has_the_digits_of_the_wider_features(dtypes) -> None:
    v, t = (torch.eye(2, dtype=dtype) for dtype in dtypes)
    assert Batch.of(v, t, 1 / 0.07).scale.item() == 1 / 0.07


def test_on_mps_which_has_no_float64_the_cpu_computes() -> None:
    with fake_cuda():
        v = torch.empty(4, 3, device="mps")
        features = Batch.of(v, v, 10.0)
        assert {x.device.type for x in features.inputs if x is not None} == {"cpu"}
        assert features.home == v.device


# --- structural ties of a batch list ----------------------------------------------------------------------


def in_modal_reference(x: torch.Tensor) -> torch.Tensor:
    _, of_texts = Batch.of(x, x, 1.0).matrices("in_modal")
    return of_texts.symmetric_reference(x @ x.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_norm_rows_have_one_value_on_the_diagonal(dtype: torch.dtype) -> None:
    x = random_batch(0, 65, 13, 1.0, duplicates=3).text.to(dtype)
    x = x.to(torch.promote_types(dtype, torch.float32))
    reference = in_modal_reference(x)
    assert len(reference.diagonal().unique()) == 1
    assert torch.equal(reference, reference.T)
    assert reference[0, -1] == reference[0, 0]  # equal rows


def test_rows_of_other_norms_rank_by_them() -> None:
    x = random_batch(0, 6, 5, 1.0).text * torch.tensor([1.0, 1.0, 2.0, 0.5, 1.1, 1.0])[:, None]
    diagonal = in_modal_reference(x).diagonal()
    assert diagonal[0] == diagonal[1] == diagonal[5]
    torch.testing.assert_close(diagonal, x.square().sum(-1), rtol=1e-12, atol=0)
