from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from batches import VECTORS, Batch, batches, gradients, random_batch, relative_error, vector_batch
from memory import TensorSizes
from rankloss import ClipLoss
from rankloss_baselines.cyclip import CyClipLoss

KEYS = ("contrastive_loss", "cyclic_cross_modal_loss", "cyclic_in_modal_loss")


def direct(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas with their N×N matrices, in float64 and with autograd."""
    v, t = v.double(), t.double()
    cross, within = v @ t.T - t @ v.T, v @ v.T - t @ t.T
    return cross.square().sum() / len(v), within.square().sum() / len(v)


def terms(v: Tensor, t: Tensor) -> list[Tensor]:
    """Both terms of the loss without their weights."""
    return [*CyClipLoss(lambda_cross=1.0, lambda_in=1.0).own_terms(v, t, 1.0).values()]


def close_pair(seed: int, n: int, d: int, noise: float, rotated: bool) -> tuple[Tensor, Tensor]:
    """Float32 texts that are the images up to noise, or up to noise and a rotation of the whole space."""
    generator = torch.Generator().manual_seed(seed)
    v, e = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    v = normalize(v + 1, dim=-1)
    t = normalize((v @ turn if rotated else v) + noise * e / math.sqrt(d), dim=-1)
    return v.float(), t.float()


@pytest.mark.parametrize("key", VECTORS)
def test_entries_are_the_float64_vectors(key: str) -> None:
    case = VECTORS[key]
    entries = CyClipLoss()(*vector_batch(case).leaves(), output_dict=True)
    assert tuple(entries) == KEYS
    expected = (case["clip"], *(case["cyclip"][term] / 4 for term in ("cross_modal", "in_modal")))
    for entry, value in zip(entries.values(), expected, strict=True):
        assert relative_error(entry, value) < 1e-9


@given(batches(), st.sampled_from([1.0, -2.7]))
def test_value_and_gradients_are_those_of_the_formula(batch: Batch, upstream: float) -> None:
    v, t, s = inputs = batch.leaves()
    loss = CyClipLoss(lambda_cross=0.7, lambda_in=0.3)
    cross, in_ = direct(v, t)
    assert [x.item() for x in loss.own_terms(v, t, s).values()] == pytest.approx(
        [0.7 * cross.item(), 0.3 * in_.item()], rel=1e-9, abs=1e-13
    )
    total, expected = loss(v, t, s), ClipLoss()(v, t, s) + 0.7 * cross + 0.3 * in_
    for a, b in zip(gradients(total, inputs, upstream), gradients(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(
    st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 24), st.sampled_from([1, 0.1, 1e-2, 1e-3])
)
def test_float32_is_right_however_close_the_modalities(seed: int, n: int, d: int, noise: float) -> None:
    for rotated in (False, True):
        leaves = [x.requires_grad_() for x in close_pair(seed, n, d, noise, rotated)]
        for actual, expected in zip(terms(*leaves), direct(*leaves), strict=True):
            if expected < 1e-9 * n:  # cosines that differ by less than some hundred roundings of float32
                continue
            assert actual.dtype == torch.float32
            assert relative_error(actual, expected) < 1e-5
            wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
            for a, b in zip(torch.autograd.grad(actual, leaves, retain_graph=True), wanted, strict=True):
                assert relative_error(a, b) < 1e-4


def test_memory_is_linear_in_the_batch() -> None:
    n, d = 512, 8
    v, t, _ = random_batch(0, n, d, 10.0).leaves(torch.float32)
    with TensorSizes() as sizes:
        sum(terms(v, t)).backward()
    assert sizes.largest <= n * d


def test_half_precision_features_are_computed_in_full() -> None:
    v, t, _ = random_batch(0, 32, 16, 10.0).leaves(torch.bfloat16)
    expected = torch.stack(direct(v.detach(), t.detach())).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.stack(terms(v, t))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(actual.sum(), (v, t)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_plausible_number_for_features_that_are_not_finite(value: float) -> None:
    for which in range(2):
        v, t, _ = random_batch(0, 6, 4, 10.0).leaves()
        with torch.no_grad():
            (v, t)[which][2, 1] = value
        assert not any(term.isfinite() for term in terms(v, t))


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("lambda_cross", -1.0, "must be a finite number >= 0.* -1.0"),
        ("lambda_in", math.nan, "must be a finite number >= 0.* nan"),
        ("gather", "no", "must be None.* 'no'"),
    ],
)
def test_bad_options_are_named(argument: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} {reason}"):
        CyClipLoss(**{argument: value})
