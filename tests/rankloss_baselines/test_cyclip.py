from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from batches import VECTORS, Batch, batches, gradients, random_batch, relative_error, unit, vector_batch
from memory import TensorSizes
from rankloss import ClipLoss
from rankloss_baselines import cyclip
from rankloss_baselines.cyclip import CyClipLoss


def by_formula(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """CyCLIP's cross-modal and in-modal terms from their N×N matrices, in float64 and with autograd."""
    v, t = v.double(), t.double()
    across, within = v @ t.T - t @ v.T, v @ v.T - t @ t.T
    return across.square().sum() / len(v), within.square().sum() / len(v)


def unweighted_terms(v: Tensor, t: Tensor) -> list[Tensor]:
    """Both terms of the loss, with weights of 1."""
    return [*CyClipLoss(lambda_cross=1.0, lambda_in=1.0).own_terms(v, t, 1.0).values()]


def close_pair(seed: int, n: int, d: int, noise: float, rotated: bool) -> tuple[Tensor, Tensor]:
    """Images, and texts that are the images up to noise, or up to noise and a rotation of the space."""
    generator = torch.Generator().manual_seed(seed)
    drawn, direction = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    images = normalize(drawn + 1, dim=-1)
    exact_texts = images @ rotation if rotated else images
    texts = normalize(exact_texts + noise * direction / math.sqrt(d), dim=-1)
    return images.float(), texts.float()


@pytest.mark.parametrize("key", VECTORS)
def test_entries_are_the_float64_vectors(key: str) -> None:
    """The file's terms have no weights, the loss's defaults are 1/4."""
    case = VECTORS[key]
    entries = CyClipLoss()(*vector_batch(case).leaves(), output_dict=True)
    owed = {
        "contrastive_loss": case["clip"],
        "cyclic_cross_modal_loss": case["cyclip"]["cross_modal"] / 4,
        "cyclic_in_modal_loss": case["cyclip"]["in_modal"] / 4,
    }
    assert list(entries) == list(owed)
    for name, entry in entries.items():
        assert relative_error(entry, owed[name]) < 1e-9


@given(batches(), st.sampled_from([1.0, -2.7]))
def test_value_and_gradients_are_those_of_the_formula(batch: Batch, upstream: float) -> None:
    v, t, s = inputs = batch.leaves()
    loss = CyClipLoss(lambda_cross=0.7, lambda_in=0.3)
    across, within = by_formula(v, t)
    terms = [*loss.own_terms(v, t, s).values()]
    torch.testing.assert_close(terms, [0.7 * across, 0.3 * within], rtol=1e-9, atol=1e-13)
    owed_value = ClipLoss()(v, t, s) + 0.7 * across + 0.3 * within
    slopes = gradients(loss(v, t, s), inputs, upstream)
    owed_slopes = gradients(owed_value, inputs, upstream)
    torch.testing.assert_close(slopes, owed_slopes, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rotated", [False, True])
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 40),
    d=st.integers(2, 24),
    noise=st.sampled_from([1, 0.1, 1e-2, 1e-3]),
)
def test_float32_is_right_however_close_the_modalities(
    rotated: bool, seed: int, n: int, d: int, noise: float
) -> None:
    leaves = [features.requires_grad_() for features in close_pair(seed, n, d, noise, rotated)]
    for term, owed in zip(unweighted_terms(*leaves), by_formula(*leaves), strict=True):
        # A term is n times the mean square of differences of cosines: here these are some hundred roundings.
        if owed < 1e-9 * n:
            continue
        assert term.dtype == torch.float32
        assert relative_error(term, owed) < 1e-5
        slopes = torch.autograd.grad(term, leaves, retain_graph=True)
        owed_slopes = torch.autograd.grad(owed, leaves, retain_graph=True)
        for slope, owed_slope in zip(slopes, owed_slopes, strict=True):
            assert relative_error(slope, owed_slope) < 1e-4


def test_rounding_leaves_no_term_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are their images but for 1e-9, beside which the sums of moments are large."""

    def least_term() -> float:
        terms: list[Tensor] = []
        for seed in range(20):
            v, moves = unit(64, 8, seed=seed), unit(64, 8, seed=100 + seed)
            terms += unweighted_terms(v, normalize(v + 1e-9 * moves, dim=-1))
        return min(term.item() for term in terms)

    assert least_term() == 0
    monkeypatch.setattr(cyclip, "_without_negative_rounding", lambda sum_of_squares: sum_of_squares)
    assert least_term() < 0


def test_no_tensor_is_larger_than_the_features() -> None:
    n, d = 512, 8
    v, t, _scale = random_batch(seed=0, n=n, d=d, scale=10.0).leaves(torch.float32)
    with TensorSizes() as sizes:
        sum(unweighted_terms(v, t)).backward()
    assert sizes.largest == n * d < n * n  # the entries of a matrix of similarities


def test_half_precision_features_are_computed_in_full() -> None:
    v, t, _scale = random_batch(seed=0, n=32, d=16, scale=10.0).leaves(torch.bfloat16)
    expected = torch.stack(by_formula(v.detach(), t.detach())).float()
    with torch.autocast("cpu", torch.bfloat16):
        values = torch.stack(unweighted_terms(v, t))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    assert {slope.dtype for slope in torch.autograd.grad(values.sum(), (v, t))} == {torch.bfloat16}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("modality", [0, 1], ids=["images", "texts"])
def test_no_plausible_number_for_features_that_are_not_finite(modality: int, value: float) -> None:
    batch = random_batch(seed=0, n=6, d=4, scale=10.0)
    features = [batch.image, batch.text]
    features[modality][2, 1] = value
    assert not any(term.isfinite() for term in unweighted_terms(*features))


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
