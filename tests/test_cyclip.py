from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from batches import VECTORS, Batch, batches, gradients, random_batch, relative_error, vector_batch
from rankloss import ClipLoss, CyClipLoss, RankClipLoss, reference

KEYS = ("contrastive_loss", "cyclic_cross_modal_loss", "cyclic_in_modal_loss")


def direct(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas with their N×N matrices, in float64 and with autograd."""
    v, t = v.double(), t.double()
    s, i, x = v @ t.T, v @ v.T, t @ t.T
    return (s - s.T).square().sum() / len(v), (i - x).square().sum() / len(v)


def close_pair(seed: int, n: int, d: int, noise: float, rotated: bool) -> tuple[Tensor, Tensor]:
    """Float32 texts that are the images up to noise, or up to noise and a rotation of the whole space."""
    generator = torch.Generator().manual_seed(seed)
    v, e = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    v = normalize(v + 1, dim=-1)
    t = normalize((v @ turn if rotated else v) + noise * e / math.sqrt(d), dim=-1)
    return v.float(), t.float()


@pytest.mark.parametrize("key", VECTORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_vectors(key: str, dtype: torch.dtype, tolerance: float) -> None:
    case = VECTORS[key]
    v, t, s = vector_batch(case).leaves(dtype)
    cross, in_ = CyClipLoss().terms(v, t)
    assert relative_error(cross, case["cyclip"]["cross_modal"]) < tolerance
    assert relative_error(in_, case["cyclip"]["in_modal"]) < tolerance
    entries = CyClipLoss()(v, t, s, output_dict=True)
    assert tuple(entries) == KEYS
    expected = (case["clip"], *(case["cyclip"][term] / 4 for term in ("cross_modal", "in_modal")))
    for entry, value in zip(entries.values(), expected, strict=True):
        assert entry.dtype == dtype
        assert relative_error(entry, value) < tolerance


@pytest.mark.parametrize(
    ("key", "loss", "gradient"),
    [
        ("0:6:4:10", 11.034531717022, 1.43229774788922),
        ("0:6:4:100", 97.9153143930865, 1.43229774788922),
        ("1:64:16:14.2857142857142857", 13.0170218419533, 1.08989723986958),
    ],
)
def test_published_code(key: str, loss: float, gradient: float) -> None:
    v, t, s = vector_batch(VECTORS[key]).leaves()
    assert CyClipLoss()(v, t, s).item() == pytest.approx(loss, rel=1e-9)
    cross, in_ = CyClipLoss().terms(v, t)
    (dv,) = torch.autograd.grad(0.25 * (cross + in_), v)
    assert dv.norm().item() == pytest.approx(gradient, rel=1e-9)


@given(batches())
def test_terms_match_the_reference(batch: Batch) -> None:
    v, t = batch.image.numpy(), batch.text.numpy()
    cross, in_ = CyClipLoss().terms(batch.image, batch.text)
    assert cross.item() == pytest.approx(reference.cyclic_cross_modal(v, t), rel=1e-9, abs=1e-13)
    assert in_.item() == pytest.approx(reference.cyclic_in_modal(v, t), rel=1e-9, abs=1e-13)


@given(
    st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 24), st.sampled_from([1, 0.1, 1e-2, 1e-3])
)
def test_float32_value_and_gradient_are_right_however_close_the_modalities(
    seed: int, n: int, d: int, noise: float
) -> None:
    for rotated in (False, True):
        leaves = [x.requires_grad_() for x in close_pair(seed, n, d, noise, rotated)]
        for actual, expected in zip(CyClipLoss().terms(*leaves), direct(*leaves), strict=True):
            if expected < 1e-12:  # below what float32 features say of one another
                continue
            assert actual.dtype == torch.float32
            assert relative_error(actual, expected) < 1e-5
            wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
            for a, b in zip(torch.autograd.grad(actual, leaves, retain_graph=True), wanted, strict=True):
                assert relative_error(a, b) < 1e-4


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1e-4, 1e-5]))
def test_a_value_that_rounds_to_zero_keeps_its_gradient(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    v, t = (rng.standard_normal(4) + spread * rng.standard_normal((2, 4)) for _ in range(2))
    leaves = [torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).requires_grad_() for x in (v, t)]
    for actual, expected in zip(CyClipLoss().terms(*leaves), direct(*leaves), strict=True):
        assert actual >= 0
        scaled = (-2.7 * value for value in (actual, expected))
        for a, b in zip(*(torch.autograd.grad(x, leaves, retain_graph=True) for x in scaled), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@given(batches(max_n=5))
def test_gradients_are_those_of_the_formula_under_any_upstream_gradient(batch: Batch) -> None:
    v, t, s = batch.leaves()
    for upstream in (1.0, -2.7):
        total = CyClipLoss(lambda_cross=0.7, lambda_in=0.3)(v, t, s)
        cross, in_ = direct(v, t)
        expected = ClipLoss()(v, t, s) + 0.7 * cross + 0.3 * in_
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(
            gradients(total, (v, t, s), upstream), gradients(expected, (v, t, s), upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradcheck() -> None:
    v, t, s = random_batch(0, 5, 3, 10.0).leaves()
    assert torch.autograd.gradcheck(CyClipLoss(), (v, t, s))
    assert torch.autograd.gradgradcheck(lambda v, t: CyClipLoss().terms(v, t), (v, t))


@given(batches(), st.randoms(use_true_random=False))
def test_terms_do_not_depend_on_order_scale_or_a_rotation(batch: Batch, random) -> None:
    v, t = batch.image, batch.text
    loss = CyClipLoss()
    expected = torch.stack(loss.terms(v, t))
    order = list(range(len(v)))
    random.shuffle(order)
    turn = torch.linalg.qr(torch.randn(v.shape[1], v.shape[1], dtype=v.dtype)).Q
    for a, b in ((v[order], t[order]), (v @ turn, t @ turn), (t, v)):
        torch.testing.assert_close(torch.stack(loss.terms(a, b)), expected, rtol=1e-9, atol=1e-12)
    for scale in (1.0, 100.0):
        entries = loss(v, t, scale, output_dict=True)
        torch.testing.assert_close(
            torch.stack([entries[key] for key in KEYS[1:]]), 0.25 * expected, rtol=0, atol=0
        )
    # Turning the texts alone leaves the in-modal term as it is.
    torch.testing.assert_close(loss.terms(v, t @ turn)[1], expected[1], rtol=1e-9, atol=1e-12)


@given(batches())
def test_terms_vanish_where_the_geometries_agree_and_are_never_negative(batch: Batch) -> None:
    v = batch.image
    cross, in_ = CyClipLoss().terms(v, v)
    assert 0 <= cross.item() < 1e-12
    assert 0 <= in_.item() < 1e-12
    turn = torch.linalg.qr(torch.randn(v.shape[1], v.shape[1], dtype=v.dtype)).Q
    assert 0 <= CyClipLoss().terms(v, v @ turn)[1].item() < 1e-12


def test_scale_gets_its_gradient_from_the_base_alone() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    (with_terms,) = torch.autograd.grad(CyClipLoss()(v, t, s), s)
    (without,) = torch.autograd.grad(ClipLoss()(v, t, s), s)
    assert torch.equal(with_terms, without)


def test_no_square_matrix_is_held() -> None:
    n = 512
    v, t, _ = random_batch(0, n, 8, 10.0).leaves(torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        sum(CyClipLoss().terms(v, t)).backward()
    assert saved
    assert max(saved) < n * n / 8


def test_half_precision_features_are_computed_in_full() -> None:
    v, t, _ = random_batch(0, 32, 16, 10.0).leaves(torch.bfloat16)
    expected = torch.stack(direct(v.detach(), t.detach())).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.stack(CyClipLoss().terms(v, t))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(actual.sum(), (v, t)))


@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (0, 0)])
def test_weight_of_zero_leaves_the_term_out(weights: tuple[float, float]) -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    loss = CyClipLoss(lambda_cross=weights[0], lambda_in=weights[1])
    entries = loss(v, t, s, output_dict=True)
    assert tuple(entries) == KEYS
    assert [bool(entries[key] != 0) for key in KEYS[1:]] == [bool(w) for w in weights]
    torch.testing.assert_close(loss(v, t, s), sum(entries.values()))
    if weights == (0, 0):
        assert torch.equal(loss(v, t, s), ClipLoss()(v, t, s))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["image", "text"])
def test_no_plausible_number_for_features_that_are_not_finite(which: str, value: float) -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    with torch.no_grad():
        (v if which == "image" else t)[2, 1] = value
    assert not CyClipLoss()(v, t, s).isfinite()
    for term in CyClipLoss().terms(v, t):
        assert not term.isfinite()


def test_bases_compose_in_either_order() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    outer = RankClipLoss(CyClipLoss(lambda_in=0.5), schedule="constant")
    inner = CyClipLoss(RankClipLoss(schedule="constant"), lambda_in=0.5)
    names = {*KEYS, "cross_modal_loss", "in_modal_loss"}
    entries = outer(v, t, s, output_dict=True)
    assert set(entries) == set(inner(v, t, s, output_dict=True)) == names
    torch.testing.assert_close(outer(v, t, s), inner(v, t, s), rtol=1e-12, atol=0)
    torch.testing.assert_close(entries["cyclic_in_modal_loss"], 0.5 * direct(v, t)[1], rtol=1e-9, atol=0)


def test_base_gets_its_own_inputs_and_nothing_is_lost_to_a_name() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    seen = {}

    def base(image_features, text_features, logit_scale, output_dict, **inputs):
        seen.update(inputs)
        return logit_scale * (image_features * text_features).sum()

    entries = CyClipLoss(base)(v, t, s, torch.tensor(-10.0), output_dict=True, labels=3)
    assert seen == {"labels": 3, "logit_bias": torch.tensor(-10.0)}
    torch.testing.assert_close(entries["contrastive_loss"], s * (v * t).sum())
    with pytest.raises(ValueError, match="an entry 'cyclic_cross_modal_loss' of its own"):
        CyClipLoss(CyClipLoss())(v, t, s)


def test_open_clips_sigmoid_loss_is_a_base() -> None:
    siglip = pytest.importorskip("open_clip.loss").SigLipLoss()
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    bias = torch.tensor(-10.0, dtype=torch.float64)
    entries = CyClipLoss(siglip)(v, t, s, bias, output_dict=True)
    assert tuple(entries) == KEYS
    torch.testing.assert_close(entries["contrastive_loss"], siglip(v, t, s, bias))


def test_there_is_no_state_and_copies_are_equal() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    loss = CyClipLoss(lambda_in=0.1)
    assert loss.state_dict() == {}
    assert torch.equal(copy.deepcopy(loss)(v, t, s), loss(v, t, s))
    assert "lambda_cross=0.25, lambda_in=0.1" in repr(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_cross": -1.0}, "lambda_cross must be finite and >= 0; got -1.0"),
        ({"lambda_in": math.nan}, "lambda_in must be finite and >= 0; got nan"),
        ({"gather": "no"}, "gather must be None .*; got 'no'"),
    ],
)
def test_bad_options_are_named_and_shown(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CyClipLoss(**options)


def test_bad_features_are_named_and_shown() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    with pytest.raises(ValueError, match=r"must have one shape \[N, D\]; got \(6, 4\) and \(5, 4\)"):
        CyClipLoss(lambda **_: v.sum())(v, t[:5], s)
    with pytest.raises(ValueError, match="text_features must be floating point"):
        CyClipLoss()(v, t.long(), s)
