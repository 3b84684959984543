"""Streamed losses, CLIP's and SigLIP's and those of one's own: the formulas, open_clip's bits, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batches import Batch, assert_close, assert_slopes, batches, gradients, random_batch
from memory import LiveBytes, TensorSizes, saved_bytes
from process_pool import Pools
from rankloss import ClipLoss, InputWarning, SigLipLoss, reference
from rankloss.losses import GatheringLoss
from rankloss.losses.score_rows import mean_of_rows
from rankloss.losses.siglip import PairSigmoid

MIB = 2**20
BYTES_OF_A_NUMBER = torch.float32.itemsize

# Each loss with its formula in NumPy, of images, texts, the scale and the bias.
LOSSES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "clip": (ClipLoss, lambda v, t, s, b, **of_ids: reference.clip(v, t, s, **of_ids)),
    "siglip": (SigLipLoss, reference.siglip),
}
both = pytest.mark.parametrize("name", LOSSES)
any_use_of_ids = pytest.mark.parametrize("same_id", [None, "ignore", "share"])

pytestmark = pytest.mark.filterwarnings("ignore:logit_bias is given")  # to both losses alike


def inputs_of(batch: Batch, dtype: torch.dtype = torch.float64, bias: float = -7.5) -> tuple[Tensor, ...]:
    """Images, texts, the scale and the bias as tensors that take a gradient."""
    return (*batch.leaves(dtype), torch.tensor(bias, dtype=dtype, requires_grad=True))


# --- value and gradients ----------------------------------------------------------------------------------


@both
@any_use_of_ids
@pytest.mark.parametrize("budget", [0, None])
@settings(max_examples=settings.default.max_examples // 3)
@given(
    batch=batches(min_n=1, max_n=17),
    times=st.sampled_from([1.0, 30.0]),
    chunk=st.integers(1, 18),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    bias=st.sampled_from([-10.0, 0.0, 2.0]),
    ids=st.lists(st.integers(0, 4), min_size=17, max_size=17),
)
@pytest.mark.filterwarnings("ignore:logit_scale is 3000")
def test_value_and_all_gradients_are_the_formulas(
    name: str,
    same_id: Any,
    budget: int | None,
    smoothing: float,
    batch: Batch,
    times: float,
    chunk: int,
    bias: float,
    ids: list[int],
) -> None:
    """A budget of 0 streams, None is whole; at 30 times a scale of 100 logits have infinite exponentials."""
    loss, formula = LOSSES[name]
    inputs = inputs_of(replace(batch, scale=times * batch.scale), bias=bias)
    pair_ids = torch.tensor(ids[: len(inputs[0])]) if same_id else None
    options: dict[str, Any] = {"same_id": same_id}
    if name == "clip":
        options["label_smoothing"] = smoothing
    value = loss(memory_budget=budget, chunk_size=chunk, **options)(*inputs, pair_ids=pair_ids)
    literal = partial(formula, pair_ids=pair_ids, **options)
    assert_close([value], [literal(*(x.detach().numpy() for x in inputs))], tolerance=1e-10)
    assert_slopes(value, inputs, literal)


@both
@pytest.mark.parametrize("same_id", ["ignore", "share"])
@pytest.mark.parametrize("budget", [0, None])
def test_of_ids_only_their_equality_counts(name: str, same_id: Any, budget: int | None) -> None:
    inputs = inputs_of(random_batch(seed=0, n=11, d=6, scale=20.0))
    loss = LOSSES[name][0](memory_budget=budget, chunk_size=4, same_id=same_id)
    ids = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4, 5, 6, 1], dtype=torch.uint8)
    names = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**62, 2**62 + 1, 7])  # one for each id
    large_ids = names[ids.long()]
    assert torch.equal(loss(*inputs, pair_ids=large_ids), loss(*inputs, pair_ids=ids))


@both
@pytest.mark.parametrize("same_id", ["ignore", "share"])
def test_the_use_of_ids_is_shown(name: str, same_id: Any) -> None:
    build, _ = LOSSES[name]
    assert repr(build(same_id=same_id)) == f"{build.__name__}(same_id={same_id!r})"


@pytest.mark.parametrize("budget", [0, None])
def test_clips_loss_of_pairs_that_all_have_one_id_to_ignore_is_zero(budget: int | None) -> None:
    """No column but the row's own is left: its cross-entropy is log 1, and has no slope."""
    inputs = inputs_of(random_batch(seed=0, n=11, d=6, scale=20.0))
    loss = ClipLoss(memory_budget=budget, chunk_size=4, same_id="ignore")
    value = loss(*inputs, pair_ids=torch.zeros(11, dtype=torch.int32))
    assert all(x.abs().max() < 1e-14 for x in (value, *gradients(value, inputs, upstream=-1.3)))


def value_beside_infinity(rank: int, world_size: int, budget: int | None) -> Tensor:
    """CLIP's loss of pairs of one id to ignore, where a text of the last process has logits of −∞."""
    v, t = torch.full((2, 3, 4), 0.5)
    if rank == world_size - 1:
        t[1] = -math.inf
    loss = ClipLoss(memory_budget=budget, same_id="ignore")
    return loss(v, t, 10.0, pair_ids=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("budget", [0, None])
def test_infinity_of_one_process_is_nan_of_those_too_that_ignore_its_column(
    pools: Pools, budget: int | None
) -> None:
    assert all(value.isnan() for value in pools[2].run(value_beside_infinity, budget))


@any_use_of_ids
@pytest.mark.parametrize("budget", [0, None])
def test_no_smoothing_changes_no_bit(same_id: Any, budget: int | None) -> None:
    """Nothing of its formula is computed."""
    inputs = inputs_of(random_batch(seed=0, n=11, d=6, scale=20.0), torch.float32)
    options = {"same_id": same_id, "memory_budget": budget}
    ids = torch.arange(11) // 2 if same_id else None
    with mock.patch("rankloss.losses.clip._excess_over_mean", side_effect=AssertionError):
        value = ClipLoss(label_smoothing=0, **options)(*inputs, pair_ids=ids)
    assert torch.equal(value, ClipLoss(**options)(*inputs, pair_ids=ids))


@pytest.mark.parametrize("n_others", [0, 1])
def test_smoothing_over_the_few_columns_that_are_left(n_others: int) -> None:
    """All other columns are of the row's id, and taken out of the sum of all: no rounding may be left behind.

    The loss in float64 is the oracle.
    """
    n = 3000
    v, t, s, _ = inputs_of(random_batch(seed=0, n=n, d=3, scale=100.0), torch.float32)
    ids = (torch.arange(n) < n_others).long()
    loss = ClipLoss(same_id="ignore", label_smoothing=0.9)
    value = loss(v, t, s, pair_ids=ids)
    exact = tuple(x.detach().double().requires_grad_() for x in (v, t, s))
    owed = loss(*exact, pair_ids=ids)
    torch.testing.assert_close(value, owed.float(), rtol=1e-5, atol=1e-6)
    slopes, owed_slopes = gradients(value, (v, t, s), upstream=1.0), gradients(owed, exact, upstream=1.0)
    torch.testing.assert_close(slopes, [x.float() for x in owed_slopes], rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", ["none", "number", "one element"])
def test_within_the_budget_the_bits_are_open_clips(name: str, dtype: torch.dtype, bias: str) -> None:
    build, _ = LOSSES[name]
    theirs = getattr(pytest.importorskip("open_clip.loss"), build.__name__)()
    v, t, s, b = inputs_of(random_batch(seed=1, n=23, d=8, scale=14.0, duplicates=3), dtype)
    number = {"none": None, "number": -7.5, "one element": b.reshape(1)}[bias]
    value, expected = build()(v, t, s, number), theirs(v, t, s, number)
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)
    slopes, expected_slopes = (gradients(x, (v, t, s), upstream=-1.3) for x in (value, expected))
    assert all(map(torch.equal, slopes, expected_slopes))


@both
@pytest.mark.parametrize(
    ("dtype", "entry_bytes"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)]
)
def test_the_budget_is_the_bytes_of_one_matrix(name: str, dtype: torch.dtype, entry_bytes: int) -> None:
    """A matrix of as many bytes is whole, of one more is streamed; its entries are float32 at least."""
    n = 10
    v, t, s, b = inputs_of(random_batch(seed=0, n=n, d=4, scale=10.0), torch.float32)
    entries = n * n

    def streams(budget: int) -> bool:
        """Whether no tensor of the loss is as large as the matrix."""
        loss = LOSSES[name][0](memory_budget=budget, chunk_size=2)
        with TensorSizes() as sizes:
            loss(v.to(dtype), t.to(dtype), s, b)
        return sizes.largest < entries

    assert not streams(entries * entry_bytes)
    assert streams(entries * entry_bytes - 1)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: None,
    "number": lambda x: x.item(),
    "scalar": lambda x: x,
    "one element": lambda x: x.reshape(1),
}
"""Of a scale or a bias, made of a tensor without dimensions."""


@both
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("scale_form", ["number", "scalar", "one element"])
@pytest.mark.parametrize("bias_form", ["none", "number", "scalar", "one element"])
def test_scale_and_bias_may_be_numbers_or_tensors_of_one_element(
    name: str, budget: int | None, scale_form: str, bias_form: str
) -> None:
    build, formula = LOSSES[name]
    v, t, s, b = inputs_of(random_batch(seed=0, n=9, d=4, scale=10.0))
    scale, bias = FORMS[scale_form](s), FORMS[bias_form](b)
    plain_bias = None if bias is None else b
    value = build(memory_budget=budget)(v, t, scale, bias)
    assert value.shape == ()
    bias_of_formula = torch.zeros(()) if bias is None else b
    expected = formula(*(x.detach().numpy() for x in (v, t, s, bias_of_formula)))
    assert_close([value], [expected], tolerance=1e-10)
    differentiable = [v, t]  # and those of scale and bias that are tensors
    if isinstance(scale, Tensor):
        differentiable.append(s)
    if isinstance(bias, Tensor):
        differentiable.append(b)
    plain_slopes = gradients(build()(v, t, s, plain_bias), tuple(differentiable), upstream=-1.3)
    assert_close(gradients(value, tuple(differentiable), upstream=-1.3), plain_slopes, tolerance=1e-10)
    of_float32 = build(memory_budget=budget)(v.float(), t.float(), scale, bias)
    assert_close([of_float32], [expected], tolerance=1e-5)


# --- memory -----------------------------------------------------------------------------------------------


@both
@any_use_of_ids
def test_what_is_kept_for_the_backward_pass_grows_linearly_with_n(name: str, same_id: Any) -> None:
    build, _ = LOSSES[name]
    loss, d = build(memory_budget=0, same_id=same_id), 4
    for n in (512, 1024):
        features_and_gradients, single_numbers = 4 * n * d, 64
        kept = kept_bytes(loss, n, d)
        assert kept <= BYTES_OF_A_NUMBER * (features_and_gradients + single_numbers)


@any_use_of_ids
def test_with_smoothing_what_is_kept_grows_linearly_with_n_too(same_id: Any) -> None:
    """Counted: 4 times the features without ids, 14 times with them; one matrix would be 128 or 256 times."""
    loss, d = ClipLoss(memory_budget=0, same_id=same_id, label_smoothing=0.2), 4
    most_times = 5 if same_id is None else 15
    for n in (512, 1024):
        bytes_of_features = BYTES_OF_A_NUMBER * n * d  # of one modality
        assert kept_bytes(loss, n, d) <= most_times * bytes_of_features


@both
@any_use_of_ids
def test_within_the_budget_whole_matrices_are_kept(name: str, same_id: Any) -> None:
    """So that the tests above would see a matrix."""
    build, _ = LOSSES[name]
    n = 1024
    assert kept_bytes(build(same_id=same_id), n, d=4) > BYTES_OF_A_NUMBER * n**2


def kept_bytes(loss: Any, n: int, d: int) -> int:
    """The bytes that a loss of n pairs of d numbers in float32 keeps for the backward pass."""
    inputs = inputs_of(random_batch(seed=0, n=n, d=d, scale=10.0), torch.float32)
    return saved_bytes(lambda: loss(*inputs, pair_ids=ids_of_four_pairs_each(n) if loss.same_id else None))


def ids_of_four_pairs_each(n: int) -> Tensor:
    """An id for each pair; four pairs have the same."""
    return torch.arange(n) % (n // 4)


@both
@any_use_of_ids
def test_no_matrix_is_held_beyond_the_default_budget(name: str, same_id: Any) -> None:
    """Counted: 9 to 17 MiB, of the blocks of rows."""
    n = 4352
    bytes_of_matrix = BYTES_OF_A_NUMBER * n**2
    assert bytes_of_matrix > 64 * MIB  # the default budget
    inputs = inputs_of(random_batch(seed=0, n=n, d=4, scale=10.0), torch.float32)
    build, _ = LOSSES[name]
    with LiveBytes() as live:
        build(same_id=same_id)(*inputs, pair_ids=ids_of_four_pairs_each(n) if same_id else None).backward()
    assert 2 * MIB < live.peak < bytes_of_matrix / 2


# --- arguments --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:logit_bias is not given")  # which other tests ignore
def test_siglip_without_a_bias_warns_once() -> None:
    v, t, s, _ = inputs_of(random_batch(seed=0, n=6, d=4, scale=10.0))
    loss = SigLipLoss()
    with pytest.warns(InputWarning) as warned:
        loss(v, t, s)
    (warning,) = warned
    assert "logit_bias is not given, so it is 0. SigLIP starts from −10" in str(warning.message)
    loss(v, t, s)  # a second warning would be an error


# --- SigLIP's pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-300, -90, -38, -20, -1, 0, 1, 20, 38, 60, 90, 300])
def test_terms_are_exact_from_where_a_pair_is_hopeless_to_where_it_is_certain(
    logit: int, dtype: torch.dtype
) -> None:
    """One pair has one logit, s·c + b, over the range of log(1 + e^y) and beyond that of e^y."""
    one = torch.ones(1, 1, dtype=dtype)  # s·c = 1, so that the bias is the logit less 1
    bias = torch.tensor(logit - 1.0, dtype=dtype, requires_grad=True)
    inputs = {"image": one, "text": one, "scale": torch.ones((), dtype=dtype), "bias": bias}
    value = mean_of_rows(PairSigmoid(), inputs, first_row=0, factors=[("image", "text")])
    (slope,) = torch.autograd.grad(value, bias)
    if logit > 0:  # both formulas in the form whose exponential is at most 1
        owed, owed_slope = math.log1p(math.exp(-logit)), -math.exp(-logit) / (1 + math.exp(-logit))
    else:
        owed, owed_slope = -logit + math.log1p(math.exp(logit)), -1 / (1 + math.exp(logit))
    # e^-300 is 0 in float32, and e^-90 has few digits there.
    tolerance = {"rel": 4 * torch.finfo(dtype).eps, "abs": 1e-37 if dtype == torch.float32 else 0}
    assert value.dtype == dtype
    assert value.item() == pytest.approx(owed, **tolerance)
    assert slope.item() == pytest.approx(owed_slope, **tolerance)


# --- a loss of one's own ----------------------------------------------------------------------------------


# Row losses as a user writes them: of a block of scores [rows, N], and the place of its first row among
# all, they give a value per row.


def softmax(scores: Tensor, first_row: int) -> Tensor:
    """CLIP's cross-entropy."""
    return scores.logsumexp(-1) - scores.diagonal(first_row)


def decoupled(scores: Tensor, first_row: int) -> Tensor:
    """CLIP's cross-entropy without the own pair in the denominator."""
    own = scores.diagonal(first_row)
    others = scores.diagonal_scatter(torch.full_like(own, -math.inf), first_row)
    return others.logsumexp(-1) - own


def sigmoid(scores: Tensor, first_row: int) -> Tensor:
    """SigLIP's: each pair is classified as right or wrong."""
    return nn.functional.softplus(scores).sum(-1) - scores.diagonal(first_row)


def squared_margins(scores: Tensor, first_row: int) -> Tensor:
    """A loss that exponentiates nothing."""
    return (scores - scores.diagonal(first_row)[:, None]).square().mean(-1)


ROW_LOSSES = [softmax, decoupled, sigmoid, squared_margins]
any_row_loss = pytest.mark.parametrize("row_loss", ROW_LOSSES)


def from_matrices(row_loss: Callable[[Tensor, int], Tensor], *inputs: Tensor) -> Tensor:
    """The mean of a row loss over the rows of both directions, from the whole matrix of scores."""
    v, t, s, b = inputs
    scores = s * v @ t.T + b
    return (row_loss(scores, 0).mean() + row_loss(scores.T, 0).mean()) / 2


@any_row_loss
@settings(max_examples=settings.default.max_examples // 3)
@given(batch=batches(min_n=2, max_n=17), chunk=st.one_of(st.none(), st.integers(1, 18)))
def test_an_own_row_loss_has_the_value_and_all_gradients_of_whole_matrices(
    row_loss: Any, batch: Batch, chunk: int | None
) -> None:
    inputs = inputs_of(batch)
    value = GatheringLoss().streamed(row_loss, *inputs, chunk_size=chunk)
    owed = from_matrices(row_loss, *inputs)
    assert_close([value], [owed], tolerance=1e-12)
    assert_close(
        gradients(value, inputs, upstream=-1.3), gradients(owed, inputs, upstream=-1.3), tolerance=1e-12
    )
    with torch.no_grad():  # where the pass computes no gradient on the way
        assert torch.equal(GatheringLoss().streamed(row_loss, *inputs, chunk_size=chunk), value)


@any_row_loss
def test_an_own_row_loss_has_the_second_derivatives_of_whole_matrices(row_loss: Any) -> None:
    inputs = inputs_of(random_batch(seed=0, n=9, d=4, scale=10.0))

    def second(value: Tensor) -> list[Tensor]:
        slopes = torch.autograd.grad(value, inputs, torch.tensor(-1.3), create_graph=True)
        return gradients(sum(slope.square().sum() for slope in slopes), inputs, upstream=0.7)

    value = GatheringLoss().streamed(row_loss, *inputs, chunk_size=2)
    assert_close(second(value), second(from_matrices(row_loss, *inputs)), tolerance=1e-10)


@any_row_loss
def test_an_own_row_loss_keeps_no_matrix(row_loss: Any) -> None:
    n, d = 1024, 4
    inputs = inputs_of(random_batch(seed=0, n=n, d=d, scale=10.0), torch.float32)
    loss = GatheringLoss()
    features_and_gradients, single_numbers = 4 * n * d, 64
    kept = saved_bytes(lambda: loss.streamed(row_loss, *inputs, chunk_size=16))
    assert kept <= BYTES_OF_A_NUMBER * (features_and_gradients + single_numbers)
    bytes_of_matrix = BYTES_OF_A_NUMBER * n**2
    with LiveBytes() as live:
        loss.streamed(row_loss, *inputs, chunk_size=16).backward()
    assert live.peak < bytes_of_matrix / 4


def test_an_own_row_loss_may_be_checkpointed() -> None:
    inputs = inputs_of(random_batch(seed=0, n=9, d=4, scale=10.0))
    stream = partial(GatheringLoss().streamed, decoupled)
    value = torch.utils.checkpoint.checkpoint(stream, *inputs, use_reentrant=False)
    plain = stream(*inputs)
    assert torch.equal(value, plain)
    assert all(
        map(torch.equal, gradients(value, inputs, upstream=-1.3), gradients(plain, inputs, upstream=-1.3))
    )


def test_an_own_row_loss_in_half_precision_and_autocast_is_computed_in_float32() -> None:
    batch = random_batch(seed=0, n=40, d=8, scale=20.0)
    inputs = inputs_of(batch, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = GatheringLoss().streamed(decoupled, *inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    owed = from_matrices(decoupled, *exact)
    assert value.dtype == torch.float32
    assert_close([value], [owed], tolerance=1e-5)
    of_bfloat16 = 5e-3  # the dtype of the inputs, which their gradients are rounded to
    assert_close(
        gradients(value, inputs, upstream=-1.3),
        gradients(owed, tuple(exact), upstream=-1.3),
        tolerance=of_bfloat16,
    )


def test_an_own_row_loss_of_a_feature_that_is_not_finite_is_nan() -> None:
    """Though the row loss itself, which clamps its scores, would be finite."""
    v, t, s, b = (x.detach() for x in inputs_of(random_batch(seed=0, n=9, d=4, scale=10.0)))
    v[3, 1] = math.inf
    assert GatheringLoss().streamed(lambda scores, _: scores.clamp(0, 1).mean(-1), v, t, s, b).isnan()


def test_a_row_loss_that_depends_on_another_tensor_with_a_gradient_is_refused() -> None:
    """That tensor would get none."""
    inputs = inputs_of(random_batch(seed=0, n=6, d=4, scale=10.0))
    margin = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def with_margin(scores: Tensor, first_row: int) -> Tensor:
        return softmax(scores * margin.exp(), first_row)

    with pytest.raises(ValueError, match="row_loss must depend on the scores alone: another tensor"):
        GatheringLoss().streamed(with_margin, *inputs)
    margin.requires_grad_(False)  # a constant is taken
    assert GatheringLoss().streamed(with_margin, *inputs).requires_grad


@pytest.mark.parametrize(
    ("row_loss", "shown"),
    [
        pytest.param(lambda scores, _: scores.sum(), r"\(\)", id="one value"),
        pytest.param(lambda scores, _: scores, r"\(6, 6\)", id="a matrix"),
        pytest.param(lambda *_: 0.5, "0.5", id="a number"),
    ],
)
def test_a_row_loss_that_gives_no_value_per_row_is_refused(row_loss: Any, shown: str) -> None:
    inputs = inputs_of(random_batch(seed=0, n=6, d=4, scale=10.0))
    needed = f"row_loss must give one value for each of 6 rows; got {shown}"
    with pytest.raises(ValueError, match=needed):
        GatheringLoss().streamed(row_loss, *inputs)
    with torch.no_grad(), pytest.raises(ValueError, match=needed):  # another pass, without gradients
        GatheringLoss().streamed(row_loss, *inputs)


def test_a_streamed_loss_checks_its_inputs() -> None:
    v, t, s, b = inputs_of(random_batch(seed=0, n=6, d=4, scale=10.0))
    stream = partial(GatheringLoss().streamed, softmax)
    with pytest.raises(ValueError, match="image_features and text_features must have one row per pair"):
        stream(v, t[:5], s, b)
    with pytest.raises(ValueError, match=r"logit_scale must be positive .*; got -10"):
        stream(v, t, -s, b)
    with pytest.raises(TypeError, match=r"logit_scale must be a float or .*; got numpy.complex64"):
        stream(v, t, np.complex64(10), b)


def test_a_chunk_of_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1; got 0"):
        GatheringLoss().streamed(
            softmax, *inputs_of(random_batch(seed=0, n=6, d=4, scale=10.0)), chunk_size=0
        )
