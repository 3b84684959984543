from __future__ import annotations

import pytest
import torch

from batches import assert_close, random_batch
from fake_cuda import fake_cuda
from rankloss.batch import Batch
from rankloss.dense import _symmetric_reference
from rankloss.engine import weighted_terms
from rankloss.options import RankOptions

V, T = torch.eye(4, 3), torch.eye(4, 3).flip(0)
META = torch.device("meta")
RANKED = (False, True, True)


def test_features_on_meta_give_terms_on_meta() -> None:
    v, t, s = random_batch(0, 4, 3, 10.0).leaves()
    weights = torch.ones(3, dtype=torch.float64)
    for options in (RankOptions(), RankOptions(lists="batch")):
        of_meta = weighted_terms(Batch.of(v.to(META), t.to(META), s), options, weights, RANKED)
        assert all(x.is_meta and x.shape == () for x in of_meta)
        with META:  # a default device, while the features are real
            values = weighted_terms(Batch.of(v, t, 10.0), options, weights, RANKED)
        assert_close(values, weighted_terms(Batch.of(v, t, s), options, weights, RANKED), 0.0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_number_as_scale_has_the_digits_of_the_wider_features(dtypes) -> None:
    batch = Batch.of(*(torch.eye(2, dtype=dtype) for dtype in dtypes), 1 / 0.07)
    assert batch.inputs.scale.item() == 1 / 0.07
    assert {x.dtype for x in batch.inputs if x is not None} == {torch.float64}


def test_a_teacher_has_no_graph_and_the_dtype_of_the_features() -> None:
    teacher = torch.eye(4).bfloat16().requires_grad_()
    reference = Batch.of(V, T, 1.0, teacher=(teacher, None)).teacher["text"]
    assert (reference.requires_grad, reference.dtype) == (False, torch.float32)


def test_on_mps_which_has_no_float64_the_cpu_computes() -> None:
    with fake_cuda():
        v = torch.empty(4, 3, device="mps")
        batch = Batch.of(v, v, 10.0)
        assert {x.device.type for x in batch.inputs if x is not None} == {"cpu"}
        assert batch.home == v.device


# --- references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_structural_ties_of_unit_norm_rows_are_exact(dtype: torch.dtype) -> None:
    """C_ij = C_ji and N equal diagonal entries: a rounding apart, they would cost about log 2 a pair."""
    x = random_batch(0, 65, 13, 1.0, duplicates=3).text.to(dtype)
    batch = Batch.of(x, x, 1.0)
    (matrix, _) = batch.references("in_modal")
    reference = _symmetric_reference(batch, matrix, matrix.cosines())
    assert len(reference.diagonal().unique()) == 1
    assert torch.equal(reference, reference.T)
    assert reference[0, -1] == reference[0, 0]  # equal rows
    assert_close([reference], [matrix.cosines()], 1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_rows_of_other_norms_rank_by_them() -> None:
    x = random_batch(0, 6, 5, 1.0).text * torch.tensor([1.0, 1.0, 2.0, 0.5, 1.02, 1.009])[:, None]
    batch = Batch.of(x, x, 1.0)
    (matrix, _) = batch.references("in_modal")
    diagonal = _symmetric_reference(batch, matrix, matrix.cosines()).diagonal()
    squares = x.square().sum(-1)
    assert_close([diagonal], [torch.stack([*squares[[5, 5]], *squares[2:]])], 1e-12)  # 1 % is unit-norm
    assert diagonal[0] == diagonal[5]
