"""``SpreadLoss``: its value and gradients, its precision, memory and messages, and its errors.

Its conditions of use are in ``conditions``, several processes in ``test_distributed``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import one_process
from batches import Batch, assert_slopes, batches, gradients, random_batch, relative_error
from collectives import Collectives
from memory import LiveBytes, TensorSizes, saved_bytes
from one_of import one_of
from rankloss import ClipLoss, Gather, RankClipLoss, RankConsistency, SigLipLoss, SpreadLoss, reference
from rankloss.spread import EPSILON, spread

ALONE = Gather.of(False)


def dot_products(image_features: Tensor, text_features: Tensor, **_: Any) -> Tensor:
    """A base loss without a matrix: minus the mean cosine of the pairs."""
    return -(image_features * text_features).sum(-1).mean()


def by_definition(v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The term in plain torch, from the matrices of similarities of the whole batch in one process."""
    whole_batch = one_process.View(v, t, s, image_anchors=v, text_anchors=t, first=0)
    return one_process.spread(whole_batch)


# --- value and gradients ----------------------------------------------------------------------------------


@given(batches(), st.sampled_from([0.0, 0.3, 2.0]))
def test_value_and_slopes_are_the_references(batch: Batch, weight: float) -> None:
    inputs = batch.leaves()

    def literal(v: Any, t: Any, s: Any) -> float:
        constant_scale = batch.scale
        return reference.clip(v, t, s) + weight * reference.spread(v, t, constant_scale)

    value = SpreadLoss(weight=weight)(*inputs)
    assert relative_error(value, literal(*(x.detach().cpu().numpy() for x in inputs))) < 1e-10
    assert_slopes(value, inputs, literal)


@given(batches(min_n=3, ties=False), st.sampled_from([1.0, -2.7]))
def test_gradients_of_every_input_are_the_definitions(batch: Batch, upstream: float) -> None:
    inputs = batch.leaves()
    value = SpreadLoss(weight=0.7)(*inputs)
    owed = ClipLoss()(*inputs) + 0.7 * by_definition(*inputs)
    for a, b in zip(gradients(value, inputs, upstream), gradients(owed, inputs, upstream), strict=True):
        assert relative_error(a, b) < 1e-9


def test_items_are_pushed_by_their_similarities_in_standard_deviations() -> None:
    """The gradient as docs/method.md has it."""
    n, d = 9, 5  # computed by the covariance, as d < n
    x, _, _ = random_batch(seed=3, n=n, d=d, scale=1.0).leaves()
    (gradient,) = torch.autograd.grad(spread(x, ALONE, x.dtype), x)
    similarities, is_other = (x @ x.T).detach(), 1 - torch.eye(n, dtype=x.dtype)
    means = (similarities * is_other).sum(-1, keepdim=True) / (n - 1)
    variances = ((similarities - means) * is_other).square().sum(-1, keepdim=True) / (n - 1)
    in_deviations = (similarities - means) / (variances + EPSILON).sqrt()
    push = (in_deviations + in_deviations.T) * is_other
    torch.testing.assert_close(gradient, push @ x.detach() / (n * (n - 1)), rtol=1e-11, atol=1e-14)


def test_the_two_ways_to_compute_it_agree() -> None:
    """Columns of zeros change no similarity, but make the matrix of similarities the smaller one."""
    v, t, s = random_batch(seed=0, n=12, d=5, scale=30.0).leaves()
    by_covariance = SpreadLoss()(v, t, s)
    by_similarities = SpreadLoss()(F.pad(v, (0, 20)), F.pad(t, (0, 20)), s)
    assert relative_error(by_covariance, by_similarities) < 1e-12
    slopes = gradients(by_covariance, (v, t), upstream=1.7), gradients(by_similarities, (v, t), upstream=1.7)
    for one, other in zip(*slopes, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("d", [3, 8], ids=["covariance", "similarities"])
def test_second_derivatives_are_right(d: int) -> None:
    v, t, s = random_batch(seed=1, n=6, d=d, scale=5.0).leaves()  # covariances where d < n
    assert torch.autograd.gradgradcheck(lambda v, t: SpreadLoss(dot_products)(v, t, s), (v, t))


@pytest.mark.parametrize("d", [4, 12], ids=["covariance", "similarities"])
def test_the_term_gives_the_scale_no_gradient(d: int) -> None:
    inputs = random_batch(seed=0, n=8, d=d, scale=10.0).leaves()
    _, _, scale = inputs
    (with_the_term,), (of_base,) = (
        gradients(loss(*inputs), (scale,), upstream=1.7) for loss in (SpreadLoss(), ClipLoss())
    )
    assert torch.equal(with_the_term, of_base)


@pytest.mark.parametrize("d", [4, 12], ids=["covariance", "similarities"])
def test_the_term_is_proportional_to_the_scale(d: int) -> None:
    v, t, s = random_batch(seed=0, n=8, d=d, scale=10.0).leaves()
    of_scale, of_three_times_the_scale = (
        SpreadLoss()(v, t, scale, output_dict=True)["spread_loss"] for scale in (s, 3 * s)
    )
    torch.testing.assert_close(of_three_times_the_scale, 3 * of_scale)


def test_a_frozen_modality_changes_no_other_gradient() -> None:
    v, t, s = random_batch(seed=0, n=9, d=4, scale=10.0).leaves()
    by_images, _, by_scale = gradients(SpreadLoss()(v, t, s), (v, t, s), upstream=1.7)
    frozen = gradients(SpreadLoss()(v, t.detach(), s), (v, s), upstream=1.7)
    for a, b in zip(frozen, (by_images, by_scale), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [4, 40], ids=["similarities", "covariance"])
def test_equal_rows_have_a_finite_gradient_and_next_to_no_spread(n: int, dtype: torch.dtype) -> None:
    """ε is added to the variance, which is 0."""
    x = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    x = x.repeat(n, 1).to(dtype).requires_grad_()
    value = spread(x, ALONE, torch.promote_types(dtype, torch.float32))
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(math.sqrt(EPSILON), rel=1e-3)
    assert gradient.abs().max() < 1e-3


def test_two_pairs_have_one_similarity_each_and_no_spread_but_epsilons() -> None:
    scale, weight = 100.0, 0.3
    v, t, s = random_batch(seed=0, n=2, d=16, scale=scale).leaves(torch.float32)
    loss = SpreadLoss(dot_products, weight=weight)(v, t, s, output_dict=True)["spread_loss"]
    assert loss.item() == pytest.approx(weight * scale * math.sqrt(EPSILON))
    assert all(x.norm() == 0 for x in gradients(loss, (v, t), upstream=1.7))


# --- precision --------------------------------------------------------------------------------------------


def drawn(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    """Unit rows: independent, in a sixteenth of the dimensions, or around a large common mean."""
    generator = torch.Generator().manual_seed(n + d + seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        x = x[:, : d // 16] @ torch.randn(d // 16, d, generator=generator, dtype=torch.float64)
    elif kind == "common mean":
        x = 0.1 * x + torch.randn(d, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize(("n", "d"), [(8, 1024), (64, 512), (600, 512), (1100, 1024), (512, 32)])
@pytest.mark.parametrize("kind", ["independent", "correlated", "common mean"])
def test_float32_is_as_exact_as_its_sums_at_every_scale(kind: str, n: int, d: int) -> None:
    """Within 2e-6 in value and 1e-5 in gradients, also where the deviations are 0.0005."""
    inputs = drawn(kind, n, d).float(), drawn(kind, n, d).flip(0).float()
    exact = tuple(x.double().requires_grad_() for x in inputs)
    rounded = tuple(x.requires_grad_() for x in inputs)
    of_scale_1 = by_definition(*exact, torch.tensor(1.0, dtype=torch.float64))
    slopes_of_scale_1 = gradients(of_scale_1, exact, upstream=1.7)
    for scale in (1.0, 14.3, 100.0):
        entry = SpreadLoss(dot_products, weight=1.0)(*rounded, scale, output_dict=True)["spread_loss"]
        assert relative_error(entry, scale * of_scale_1) < 2e-6
        for slope, owed in zip(gradients(entry, rounded, upstream=1.7), slopes_of_scale_1, strict=True):
            assert relative_error(slope, scale * owed) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [24, 200], ids=["similarities", "covariance"])
def test_half_precision_features_are_computed_in_float32(n: int, dtype: torch.dtype) -> None:
    half = drawn("common mean", n, 64).to(dtype)
    owed = spread(half.double(), ALONE, torch.float64)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            entry = SpreadLoss(dot_products, weight=1.0)(half, half, 1.0, output_dict=True)["spread_loss"]
        assert entry.dtype == torch.float32
        assert relative_error(entry, owed) < 1e-4  # the features' own dtype would be off by 1e-3 or more


# --- memory and messages ----------------------------------------------------------------------------------


def test_the_backward_pass_keeps_the_features_as_many_numbers_more_and_the_covariance() -> None:
    n, d = 2048, 64
    x = drawn("independent", n, d).float().requires_grad_()
    kept = saved_bytes(lambda: spread(x, ALONE, torch.float32))
    features_and_as_many_more, covariance_and_mean = 2 * n * d, d * d + d
    numbers_of_each_row, single_numbers = 4 * n, 16
    at_most = features_and_as_many_more + covariance_and_mean + numbers_of_each_row + single_numbers
    bytes_of_a_number = torch.float32.itemsize
    assert bytes_of_a_number * features_and_as_many_more < kept <= bytes_of_a_number * at_most


@pytest.mark.parametrize("n", [512, 1024])
def test_memory_is_linear_in_the_pairs(n: int) -> None:
    d = 32
    v, t = (drawn("independent", n, d, seed).float().requires_grad_() for seed in range(2))
    with TensorSizes() as sizes, LiveBytes() as live:
        SpreadLoss(dot_products)(v, t, 10.0).backward()
    assert sizes.largest == n * d
    # Counted: 7 times the features and the covariance of a modality, as both have gradients. One matrix of
    # similarities would be 16 or 32 times the features.
    bytes_of_features_and_covariance = torch.float32.itemsize * (n * d + d * d)
    assert live.peak < 9 * bytes_of_features_and_covariance


def test_a_step_holds_the_features_and_a_covariance_a_modality_more_than_its_base() -> None:
    n, d = 1024, 64

    def peak_of(loss: Any) -> int:
        """The most bytes that live at a time in a step."""
        v, t = (drawn("independent", n, d, seed).float().requires_grad_() for seed in range(2))
        with LiveBytes() as live:
            loss(v, t, 10.0).backward()
        return live.peak

    features_and_covariances, numbers_of_each_pair = 2 * (n * d + d * d), 16 * n
    numbers_more = (peak_of(SpreadLoss()) - peak_of(ClipLoss())) / torch.float32.itemsize
    assert features_and_covariances <= numbers_more <= features_and_covariances + numbers_of_each_pair


def test_few_pairs_of_many_dimensions_hold_no_covariance() -> None:
    n, d = 16, 512
    v, t = (drawn("independent", n, d, seed).float().requires_grad_() for seed in range(2))
    with TensorSizes() as sizes:
        SpreadLoss(dot_products)(v, t, 10.0).backward()
    assert sizes.largest == n * d < d * d


def test_one_of_1024_processes_sums_means_and_covariances_forward_and_backward() -> None:
    processes, n, d = 1024, 4, 32
    v, t = (drawn("independent", n, d, seed).float().requires_grad_() for seed in range(2))
    features_of_all = [x.repeat(processes, 1) for x in (v, t)]
    with one_of(processes, (v, t), features_of_all):
        loss = SpreadLoss()
        with Collectives() as forward:
            value = loss(v, t, 10.0)
        with Collectives() as backward:
            value.backward()
    bytes_of_sums = 2 * (d + d * d) * torch.float32.itemsize  # a mean and a covariance of each modality
    bytes_of_checks = 2 * 24  # of the loss and of its base, three numbers of 8 bytes each
    assert forward.filled == {"allreduce": bytes_of_sums + bytes_of_checks}
    assert backward.filled == {"allreduce": bytes_of_sums}


# --- composition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, SigLipLoss(), RankClipLoss(schedule="constant")], ids=str)
def test_entries_are_the_bases_and_its_own_and_add_up(base: Any) -> None:
    inputs = random_batch(seed=0, n=6, d=4, scale=10.0).leaves()
    loss = SpreadLoss(base, weight=0.5)
    of_base = (base or ClipLoss())(*inputs, output_dict=True)
    entries = loss(*inputs, output_dict=True)
    assert list(entries) == [*of_base, "spread_loss"]
    assert all(torch.equal(entries[name], value) for name, value in of_base.items())
    assert relative_error(entries["spread_loss"], 0.5 * by_definition(*inputs)) < 1e-12
    torch.testing.assert_close(loss(*inputs), sum(entries.values()))


def test_encoders_that_share_no_space_have_a_spread() -> None:
    """Texts of three dimensions, images of six; the base compares items of one modality alone."""
    v, t, s = random_batch(seed=0, n=9, d=6, scale=10.0).leaves()
    narrow = F.normalize(t[:, :3], dim=-1)
    # Any scalar serves in place of CLIP's loss, which would multiply images with texts.
    base = RankClipLoss(lambda *_, **__: v.sum(), lambda_cross=0.0, schedule="constant")
    entry = SpreadLoss(base, weight=1.0)(v, narrow, s, output_dict=True)["spread_loss"]
    of_images, of_texts = (reference.spread(x.detach(), x.detach(), 10.0) for x in (v, narrow))
    assert relative_error(entry, (of_images + of_texts) / 2) < 1e-12


@pytest.mark.parametrize(
    ("base", "named"),
    [
        (RankConsistency(), r"cross_modal_loss \(torch.Tensor\), in_modal_loss \(torch.Tensor\)"),
        (lambda **_: {}, "got no entry"),
        (lambda **_: None, r"contrastive_loss \(NoneType\)"),
    ],
    ids=["rank terms alone", "an empty dict", "nothing"],
)
def test_a_base_without_a_loss_of_pairs_is_refused(base: Any, named: str) -> None:
    inputs = random_batch(seed=0, n=6, d=4, scale=10.0).leaves()
    with pytest.raises(ValueError, match=f"base must give a loss of pairs.*contrastive_loss.*{named}"):
        SpreadLoss(base)(*inputs)
