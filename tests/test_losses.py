from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from batches import VECTORS, Batch, batches, gradients, random_batch, teacher_of, vector_batch
from devices import DEVICE
from rankloss import (
    ClipLoss,
    Gather,
    InputWarning,
    MimicryLoss,
    RankClipLoss,
    RankConsistency,
    SigLipLoss,
    SpreadLoss,
    checks,
    schedules,
)
from rankloss.checks import check_teacher
from rankloss.precision import nan_unless_finite
from subjects import SUBJECTS, TEACHER, Subject, drawn_inputs, result_of

IMAGE, TEXT = TEACHER


def features() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and the scale of six pairs."""
    return random_batch(seed=0, n=6, d=4, scale=10.0).leaves()


def rank_clip_at(lambda_: float, **options: Any) -> RankClipLoss:
    """RankClipLoss whose schedule has reached this λ."""
    loss = RankClipLoss(schedule=lambda i, n: lambda_, **options)
    loss.set_epoch(epoch=1, epochs=5)  # any epoch: the schedule is constant
    return loss


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cross_modal", "in_modal"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_term_of_weight_zero_is_zero(cross_modal: float, in_modal: float) -> None:
    entries = RankConsistency(cross_modal=cross_modal, in_modal=in_modal)(*features(), output_dict=True)
    is_zero = {name: entry.item() == 0 for name, entry in entries.items()}
    assert is_zero == {"cross_modal_loss": cross_modal == 0, "in_modal_loss": in_modal == 0}


def test_terms_of_weight_zero_have_no_graph() -> None:
    entries = RankConsistency(cross_modal=0.0, in_modal=0.0)(*features(), output_dict=True)
    assert not any(entry.requires_grad for entry in entries.values())


@pytest.mark.parametrize(("cross_modal", "in_modal"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_nan_is_seen_in_a_sum_with_a_term_of_weight_zero(cross_modal: float, in_modal: float) -> None:
    v, t, s = features()
    assert RankConsistency(cross_modal=cross_modal, in_modal=in_modal)(v * math.nan, t, s).isnan()


@pytest.mark.parametrize("budget", [None, 0])
def test_clips_loss_of_a_single_pair_is_zero(budget: int | None) -> None:
    v, t, s = features()
    assert ClipLoss(memory_budget=budget)(v[:1], t[:1], s).item() == 0


@pytest.mark.parametrize("budget", [None, 0])
def test_siglips_loss_of_a_single_pair_is_that_of_its_own_logit(budget: int | None) -> None:
    v, t, s = features()
    v, t = v[:1], t[:1]
    bias = -10.0
    expected = -torch.nn.functional.logsigmoid(s * (v * t).sum() + bias)
    torch.testing.assert_close(SigLipLoss(memory_budget=budget)(v, t, s, bias), expected)


# By the formula of schedules.official, λ is 0, 1 and 2 in these epochs of 64.
at_three_lambdas = pytest.mark.parametrize(("epoch", "lambda_"), [(1, 0), (22, 1), (64, 2)])
of_two_batches = pytest.mark.parametrize("key", ["0:6:4:10", "1:64:16:14.2857142857142857"])
DIRECTIONS = {"cross_modal": ("S|R", "R|S"), "in_modal": ("I|X", "X|I")}
"""The two kinds of lists of a term, as the vectors name them."""


def entries_of_official_recipe(key: str, epoch: int) -> dict[str, Tensor]:
    """The entries for a case of the vectors in an epoch of the recipe's 64."""
    loss = RankClipLoss(schedule="official")
    loss.set_epoch(epoch=epoch, epochs=64)
    entries: dict[str, Tensor] = loss(*vector_batch(VECTORS[key]).leaves(), output_dict=True)
    return entries


@of_two_batches
@at_three_lambdas
def test_rank_clip_is_clips_loss_and_a_32nd_of_the_two_directions(
    key: str, epoch: int, lambda_: float
) -> None:
    """The vectors have the likelihood of each of a direction's N lists.

    The term of the direction is their mean over the lists, by the N items of a list.
    """
    case = VECTORS[key]
    entries = entries_of_official_recipe(key, epoch)
    owed = {"contrastive_loss": case["clip"]}
    lists = items_of_a_list = case["N"]
    for term, directions in DIRECTIONS.items():
        sums_over_lists = [sum(case["plackett_luce"][direction]) for direction in directions]
        of_both_directions = sum(sums_over_lists) / lists / items_of_a_list
        owed[f"{term}_loss"] = lambda_ / 32 * of_both_directions
    values = {name: entry.item() for name, entry in entries.items()}
    assert values == pytest.approx(owed, rel=1e-10)


@of_two_batches
@at_three_lambdas
def test_the_rank_terms_are_the_published_codes_but_for_its_floor(
    key: str, epoch: int, lambda_: float
) -> None:
    """That code adds 1e-10 inside the logarithm; the vectors have its terms."""
    of_the_floor = 1e-3  # by which it moves the terms at most, at these scales
    entries = entries_of_official_recipe(key, epoch)
    for term in DIRECTIONS:
        published = VECTORS[key]["official_code"][term]
        assert entries[f"{term}_loss"].item() == pytest.approx(lambda_ * published, rel=of_the_floor)


@given(batches())
def test_entries_are_weighted_by_lambda_the_terms_weight_and_the_normalizer(batch: Batch) -> None:
    loss = RankClipLoss(schedule="linear", lambda_cross=0.5, lambda_in=3.0, normalizer=0.1)
    loss.set_epoch(epoch=3, epochs=5)  # λ = 0.5
    inputs = (batch.image, batch.text, batch.scale)
    terms = RankConsistency()(*inputs, output_dict=True)
    owed = {  # λ · the term's weight · the normalizer
        "contrastive_loss": ClipLoss()(*inputs),
        "cross_modal_loss": 0.5 * 0.5 * 0.1 * terms["cross_modal_loss"],
        "in_modal_loss": 0.5 * 3.0 * 0.1 * terms["in_modal_loss"],
    }
    torch.testing.assert_close(loss(*inputs, output_dict=True), owed)
    torch.testing.assert_close(loss(*inputs), sum(owed.values()))


def test_rank_weights_are_lambda_times_the_terms_weight_times_the_normalizer() -> None:
    loss = RankClipLoss(schedule="linear", lambda_cross=0.5, lambda_in=3.0, normalizer=0.1)
    loss.set_epoch(epoch=3, epochs=5)  # λ = 0.5
    assert loss.rank_weights == pytest.approx({"cross_modal": 0.5 * 0.5 * 0.1, "in_modal": 0.5 * 3.0 * 0.1})


any_loss_without_ranks = pytest.mark.parametrize(
    "loss",
    [rank_clip_at(0.0), rank_clip_at(1.0, lambda_cross=0, lambda_in=0), rank_clip_at(1.0, normalizer=0)],
    ids=["λ is 0", "both terms' weights are 0", "the normalizer is 0"],
)


@any_loss_without_ranks
def test_rank_terms_of_factor_zero_leave_value_and_gradients_of_the_base_to_the_last_bit(
    loss: nn.Module,
) -> None:
    inputs = random_batch(seed=0, n=32, d=16, scale=100.0).leaves(torch.float32)
    value, of_base = loss(*inputs), ClipLoss()(*inputs)
    assert torch.equal(value, of_base)
    slopes = gradients(value, inputs, upstream=-1.7)
    slopes_of_base = gradients(of_base, inputs, upstream=-1.7)
    assert all(map(torch.equal, slopes, slopes_of_base))


@any_loss_without_ranks
def test_rank_terms_of_factor_zero_have_their_entries_each_in_memory_of_its_own(loss: nn.Module) -> None:
    """A trainer that adds to an entry in place changes no other entry."""
    entries = loss(*features(), output_dict=True)
    assert list(entries) == ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert len({entry.data_ptr() for entry in entries.values()}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_value_and_entries_have_float32_or_a_wider_dtype_at_every_lambda(
    dtype: torch.dtype, lambda_: float
) -> None:
    inputs, loss = random_batch(seed=0, n=6, d=4, scale=10.0).leaves(dtype), rank_clip_at(lambda_)
    value, entries = loss(*inputs), loss(*inputs, output_dict=True)
    dtypes = {x.dtype for x in (value, *entries.values())}
    assert dtypes == {torch.promote_types(dtype, torch.float32)}


NAMES_OF_LARGE = [
    "ClipLoss",
    "ClipLoss[share]",
    "ClipLoss[smoothed, ignore]",
    "SigLipLoss",
    "RankConsistency[bins]",
    "RankConsistency[top one]",
    "RankedLists[negatives, top k]",
    "RankClipLoss",
    "RankClipLoss[over SigLipLoss]",
    "MimicryLoss[default]",
    "SpreadLoss[similarities]",  # which so many pairs compute from the covariance
]
OF_OTHER_PACKAGES = [subject for subject in SUBJECTS if not subject.covers]
LARGE = [subject for subject in SUBJECTS if subject.name in NAMES_OF_LARGE] + OF_OTHER_PACKAGES
"""The subjects of large batches: rankloss's own by name, and all of other packages."""
HALF_DTYPES = (torch.float16, torch.bfloat16)
ROUNDINGS = {torch.float16: 1e-3, torch.bfloat16: 6e-2, torch.float32: 1e-4}
"""The largest errors, relative to the norm: some roundings of the dtype, which gradients are rounded to."""


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (512, torch.float32),
        *((512, dtype) for dtype in HALF_DTYPES),
        *(pytest.param(4096, dtype, marks=pytest.mark.slow) for dtype in HALF_DTYPES),
    ],
)
@pytest.mark.parametrize("subject", LARGE, ids=str)
@pytest.mark.filterwarnings("ignore:.*norm")
def test_a_large_batch_is_as_exact_as_its_dtype(n: int, subject: Subject, dtype: torch.dtype) -> None:
    """The same rounded features in a wider dtype give the value and the gradients that are owed.

    Half precision is compared with float32, and float32, of features in clusters, with float64. Computed in
    float16 these would overflow: the cube of the norms by which the losses tell infinite features, from some
    400 pairs on, and sums of SigLIP's terms and of entropies, of more pairs.
    """
    kind, wider = "plain", torch.float32
    if dtype is torch.float32:
        kind, wider = "clusters", torch.float64
    in_float32 = subject.pick(drawn_inputs(kind, n), torch.float32)
    rounded, exact = {}, {}
    for name, x in in_float32.items():
        is_feature = name.endswith("features")
        rounded[name] = x.to(DEVICE, dtype) if is_feature else x.to(DEVICE)
        exact[name] = rounded[name].to(wider) if x.is_floating_point() else rounded[name]
    upstream = torch.tensor(4096.0, device=DEVICE)  # as a scaler of gradients has it
    of_rounded, of_exact = (result_of(subject, inputs, upstream=upstream) for inputs in (rounded, exact))
    tolerance = ROUNDINGS[dtype]
    assert (of_rounded.value - of_exact.value).norm() <= tolerance * of_exact.value.norm()
    for name, gradient in of_exact.gradients.items():
        assert (of_rounded.gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_nan_for_an_infinite_entry_and_not_for_the_norms_of_65536_rows(
    dtype: torch.dtype,
) -> None:
    """65536 squared norms of 1 add up to more than float16 holds, whose largest number is 65504."""
    rows = torch.full((2**16, 4), 0.5, dtype=dtype)
    weights = torch.ones(3, dtype=torch.float64)
    assert torch.equal(nan_unless_finite(weights, rows, rows, rows), weights)
    rows[7, 2] = math.inf
    assert nan_unless_finite(weights, rows).isnan().all()


@pytest.mark.filterwarnings("ignore:logit_bias is given")
@pytest.mark.parametrize("bias", [-10.0, -10, torch.tensor(-10.0), torch.tensor([-10.0])], ids=repr)
@pytest.mark.parametrize(
    "loss", [ClipLoss(), ClipLoss(memory_budget=0), rank_clip_at(1.0), rank_clip_at(0.0)], ids=str
)
def test_bias_changes_nothing_at_any_lambda(bias: Tensor | float, loss: nn.Module) -> None:
    entries = loss(*features(), logit_bias=bias, output_dict=True)
    without_bias = loss(*features(), output_dict=True)
    torch.testing.assert_close(entries, without_bias, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "build",
    [ClipLoss, lambda: ClipLoss(memory_budget=0), lambda: rank_clip_at(1.0), lambda: rank_clip_at(0.0)],
    ids=["ClipLoss", "streamed ClipLoss", "RankClipLoss", "RankClipLoss at λ = 0"],
)
def test_bias_of_a_softmax_is_warned_of_once(build: Callable[[], nn.Module]) -> None:
    """A bias is part of a model for the sigmoid loss, for which the loss may have been meant."""
    v, t, s = features()
    loss = build()
    loss(v, t, s)  # which has no bias, and no warning
    with pytest.warns(InputWarning, match="logit_bias is given, and CLIP's softmax .*SigLipLoss") as warned:
        loss(v, t, s, logit_bias=-10.0)
    assert len(warned) == 1
    loss(v, t, s, logit_bias=-10.0)  # a second warning would be an error


# --- λ ----------------------------------------------------------------------------------------------------


UNKNOWN_PROGRESS = r"RankClipLoss does not know where training stands.*set_epoch.*set_progress"


def test_before_the_progress_of_the_training_is_known_there_is_no_lambda() -> None:
    loss = RankClipLoss()
    assert loss.schedule_value is None
    with pytest.raises(RuntimeError, match=UNKNOWN_PROGRESS):
        loss(*features())
    with pytest.raises(RuntimeError, match=UNKNOWN_PROGRESS):
        _ = loss.rank_weights


def test_a_constant_lambda_is_known_from_the_start() -> None:
    assert RankClipLoss(schedule="constant").schedule_value == 1.0


def test_lambda_is_that_of_the_later_call_of_set_epoch_and_set_progress() -> None:
    loss = RankClipLoss()
    for epoch in (1, 2, 5):
        loss.set_epoch(epoch=epoch, epochs=5)
        assert loss.schedule_value == schedules.rankclip(epoch, 5)
    loss.set_progress(np.int64(7), np.int64(100))
    assert loss.schedule_value == schedules.rankclip(7, 100)
    loss.set_epoch(epoch=3, epochs=20)
    assert loss.schedule_value == schedules.rankclip(3, 20)


a_ramp = pytest.mark.parametrize(
    "schedule", ["rankclip", lambda i, n: (i - 1) / (n - 1)], ids=["by name", "function"]
)
"""Schedules that one epoch alone does not determine: their formulas divide by n − 1."""


@a_ramp
def test_a_single_epoch_has_no_lambda_of_an_earlier_run_and_says_that_steps_set_it(
    schedule: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loss = RankClipLoss(schedule=schedule)
    loss.set_epoch(epoch=10, epochs=10)  # the earlier run
    with caplog.at_level(logging.INFO, logger="rankloss"):
        loss.set_epoch(epoch=1, epochs=1)
    assert "epochs=1 has no ramp: the schedule is evaluated per step" in caplog.text
    with pytest.raises(RuntimeError, match=r"does not know where training stands.*set_progress"):
        loss(*features())


@a_ramp
def test_a_single_epoch_leaves_the_lambda_of_a_step(schedule: Any) -> None:
    loss = RankClipLoss(schedule=schedule)
    loss.set_progress(step=2, total_steps=50)
    loss.set_epoch(epoch=1, epochs=1)
    assert loss.schedule_value == loss.schedule(2, 50)


@pytest.mark.parametrize("outer", [SpreadLoss, MimicryLoss])
@pytest.mark.parametrize("method", ["set_epoch", "set_progress"])
def test_a_loss_without_a_schedule_passes_the_progress_on_to_its_base(outer: Any, method: str) -> None:
    loss = outer(outer(RankClipLoss(schedule="linear")))
    tell_progress = getattr(loss, method)
    tell_progress(2, 5)
    assert loss.base.base.schedule_value == (2 - 1) / (5 - 1)  # linear: (i − 1)/(n − 1)


@pytest.fixture
def trained() -> RankClipLoss:
    """A loss whose training has ended with λ = 1."""
    loss = RankClipLoss(schedule="linear", normalizer=1.0)
    loss.set_progress(step=3, total_steps=3)
    loss.end_training()
    return loss


def test_lambda_of_a_training_that_has_ended_is_for_no_other_training(trained: RankClipLoss) -> None:
    with pytest.raises(
        RuntimeError, match=r"lambda of a training that has ended: .*call set_epoch.*set_progress"
    ):
        trained(*features())


def test_lambda_of_a_training_that_has_ended_is_for_evaluations(trained: RankClipLoss) -> None:
    training = RankClipLoss(schedule="linear", normalizer=1.0)
    training.set_progress(step=3, total_steps=3)
    value = training(*features())
    with torch.no_grad():
        assert torch.equal(trained(*features()), value)
    assert torch.equal(trained.eval()(*features()), value)
    assert trained.schedule_value == 1


def test_a_single_epoch_which_sets_no_lambda_does_not_begin_another_training(trained: RankClipLoss) -> None:
    trained.set_epoch(epoch=1, epochs=1)
    with pytest.raises(RuntimeError, match="has ended"):
        trained(*features())


def test_another_training_begins_with_a_lambda_of_its_own(trained: RankClipLoss) -> None:
    trained.set_progress(step=1, total_steps=2)
    trained(*features())
    assert trained.schedule_value == 0


def test_a_constant_lambda_has_no_training_that_ends() -> None:
    loss, inputs = RankClipLoss(schedule="constant"), features()
    value = loss(*inputs)
    loss.end_training()
    assert torch.equal(loss(*inputs), value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_lambda_that_is_set_in_a_mode_without_gradients_changes_no_pending_backward_pass_and_stays_set(
    mode: Callable[[], Any],
) -> None:
    loss, inputs = RankClipLoss(normalizer=1.0), features()
    loss.set_epoch(epoch=1, epochs=10)
    pending = loss(*inputs)
    expected = gradients(loss(*inputs), inputs, upstream=2.0)  # of a second graph at the same λ
    with mode():
        loss.set_epoch(epoch=10, epochs=10)
        value_in_mode = loss(*inputs)
    assert all(map(torch.equal, gradients(pending, inputs, upstream=2.0), expected))
    assert torch.equal(loss(*inputs), value_in_mode)
    assert value_in_mode != pending, "λ of the two epochs differs"


def compilations(step: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> int:
    """The number of graphs that dynamo compiles of a step which is called with these arguments."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    return counter.frame_count


needs_numbers_in_graphs = pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6 makes every float a constant"
)


@needs_numbers_in_graphs
@pytest.mark.parametrize(
    "scale_of",
    [lambda epoch: torch.tensor(10.0 + epoch), lambda epoch: 10.0],
    ids=["tensor that changes", "number"],
)
def test_a_loss_is_one_call_between_two_graphs_that_lambda_does_not_recompile(
    scale_of: Callable[[int], Any],
) -> None:
    v, t, _ = features()
    loss = RankClipLoss(schedule="official")  # λ is 0 in the first epoch

    def step(scale: Any) -> Tensor:
        return 2 * loss(-v, -t, scale)

    def in_each_epoch() -> Iterator[tuple[Any]]:
        for epoch in range(1, 7):
            loss.set_epoch(epoch=epoch, epochs=20)
            yield (scale_of(epoch),)

    before_and_after_the_loss = 2  # graphs, which serve six epochs
    assert compilations(step, in_each_epoch()) == before_and_after_the_loss


@needs_numbers_in_graphs
def test_an_epoch_that_is_set_within_the_compiled_step_recompiles_once_at_most() -> None:
    v, t, _ = features()
    loss = RankClipLoss(schedule="official")

    def step(epoch: int, scale: Tensor) -> Tensor:
        loss.set_epoch(epoch=epoch, epochs=20)
        return 2 * loss(v, t, scale)

    calls = [(epoch, torch.tensor(10.0 + epoch)) for epoch in range(1, 7)]
    # Dynamo may compile the graph after the loss for the first epoch as a constant, and once more for any.
    assert compilations(step, calls) <= 2


def test_a_loss_is_no_part_of_a_full_graph() -> None:
    loss = RankClipLoss(schedule="constant")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(loss, backend="eager", fullgraph=True)(*features())


# --- bases ------------------------------------------------------------------------------------------------


class BaseOfOthers(nn.Module):
    """A base of another package, with an entry and an input (``labels``) of its own, and without a bias."""

    def forward(self, image_features, text_features, logit_scale, output_dict=False, labels=None):
        assert output_dict, "RankClipLoss always asks its base for entries"
        return {
            "caption_loss": labels.sum(),
            "contrastive_loss": logit_scale * (image_features * text_features).sum(),
        }


def test_entries_of_any_base_stand_before_the_rank_terms_and_all_add_up() -> None:
    v, t, s = features()
    loss = RankClipLoss(BaseOfOthers(), schedule="constant")
    entries = loss(v, t, s, output_dict=True, labels=torch.ones(3))
    assert list(entries) == ["caption_loss", "contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert entries["caption_loss"] == 3
    torch.testing.assert_close(loss(v, t, s, labels=torch.ones(3)), sum(entries.values()))


def test_an_input_that_a_base_does_not_take_is_its_error() -> None:
    loss = RankClipLoss(BaseOfOthers(), schedule="constant")
    with pytest.raises(TypeError, match="unexpected keyword argument 'logit_bias'"):
        loss(*features(), logit_bias=torch.zeros(()), labels=torch.ones(3))


def test_the_scalar_of_a_base_is_its_contrastive_loss() -> None:
    v, t, s = features()

    def base(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool) -> Tensor:
        return logit_scale * (image_features * text_features).sum()

    entries = RankClipLoss(base, schedule="constant")(v, t, s, output_dict=True)
    torch.testing.assert_close(entries["contrastive_loss"], s * (v * t).sum())


at_both_lambdas = pytest.mark.parametrize("lambda_", [0.0, 1.0])


@at_both_lambdas
def test_a_base_keeps_its_smoothing(lambda_: float) -> None:
    base = ClipLoss(label_smoothing=0.2)
    entries = rank_clip_at(lambda_, base=base)(*features(), output_dict=True)
    assert torch.equal(entries["contrastive_loss"], base(*features()))
    assert (base(*features()) - ClipLoss()(*features())).abs() > 0.1, "the smoothing changes the loss"


def three_times(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 3 * entry for name, entry in entries.items()}


@at_both_lambdas
def test_a_hook_of_the_base_is_called(lambda_: float) -> None:
    """Though the rank terms' pass could compute CLIP's loss by itself."""
    loss = rank_clip_at(lambda_)
    loss.base.register_forward_hook(lambda module, inputs, output: three_times(output))
    entries = loss(*features(), output_dict=True)
    torch.testing.assert_close(entries["contrastive_loss"], 3 * ClipLoss()(*features()))


@at_both_lambdas
def test_a_forward_that_is_set_on_the_base_is_called(lambda_: float) -> None:
    loss = rank_clip_at(lambda_)
    forward = loss.base.forward
    loss.base.forward = lambda **inputs: three_times(forward(**inputs))
    entries = loss(*features(), output_dict=True)
    torch.testing.assert_close(entries["contrastive_loss"], 3 * ClipLoss()(*features()))


def test_a_base_that_is_built_shares_the_gathering() -> None:
    gather = Gather(local_loss=False)
    assert RankClipLoss(gather=gather).base.gather == gather


def test_a_base_that_is_passed_keeps_its_gathering() -> None:
    base = ClipLoss(gather=False)
    assert RankClipLoss(base, gather=Gather(local_loss=False)).base is base
    assert base.gather == Gather.of(False)


def test_a_weight_that_is_changed_counts_from_the_next_call() -> None:
    loss = RankConsistency()
    before = loss(*features(), output_dict=True)
    loss.cross_modal, loss.in_modal = 0.5, 4.0  # powers of two: the products are exact
    owed = {
        "cross_modal_loss": before["cross_modal_loss"] / 2,
        "in_modal_loss": before["in_modal_loss"] * 4,
    }
    torch.testing.assert_close(loss(*features(), output_dict=True), owed, rtol=0, atol=0)
    torch.testing.assert_close(loss(*features()), sum(owed.values()))


def test_a_weight_of_rank_clip_cannot_be_set_later() -> None:
    with pytest.raises(AttributeError, match="lambda_cross"):
        RankClipLoss().lambda_cross = 2.0


# --- looks at values --------------------------------------------------------------------------------------


V, T, S = (x.detach() for x in features())
LOG = torch.tensor(2.66)
"""The logarithm of a scale, 14.3, where the scale itself is asked for: a common mistake."""

OF_UNIT_NORM = [x for x in SUBJECTS if x.takes_pairs and x.name != "SpreadLoss[covariance]"]
"""The losses of pairs whose subject hands them features of unit norm: the one left out folds them before."""


@pytest.mark.parametrize("subject", OF_UNIT_NORM, ids=str)
def test_suspicious_input_is_computed_with_a_warning_at_the_first_call(subject: Subject) -> None:
    inputs, loss = subject.pick(drawn_inputs()), subject.started()
    inputs.update(text_features=2 * inputs["text_features"], logit_scale=LOG)
    with pytest.warns(InputWarning) as warned:
        assert loss(**inputs).isfinite()
    first_words = {str(warning.message).split()[0] for warning in warned}  # the arguments' names
    assert {"text_features", "logit_scale"} <= first_words
    loss(**inputs)  # a second warning would be an error


def test_norms_are_looked_at_when_they_can_be_read() -> None:
    """A first call with features that have no values leaves the warning to a later one."""
    loss = ClipLoss()
    loss(2 * V.to("meta"), T.to("meta"), 10.0)
    with pytest.warns(InputWarning, match="image_features should be unit-norm.* off by up to 1"):
        loss(2 * V, T, S)


def test_a_small_scale_of_features_of_another_norm_is_a_scale() -> None:
    """Products of rows of norm 5 are up to 25, and a scale of 3 is as one of 75 on cosines."""
    with pytest.warns(InputWarning) as warned:
        ClipLoss()(5 * V, 5 * T, 3.0)
    first_words = {str(warning.message).split()[0] for warning in warned}
    assert first_words == {"image_features", "text_features"}  # the norms alone


SCALES = {
    "a temperature": (0.07, r"only 0\.07, as a temperature is: .* 1 / logit_scale$"),
    "a temperature that is learned": (
        nn.Parameter(torch.tensor(0.07)),
        r"a parameter of value 0\.07, as a temperature is: .* 1 / logit_scale$",
    ),
    "a computed temperature": (nn.Parameter(-LOG).exp(), r"only 0\.06995, as a temperature is: "),
    "a logarithm": (nn.Parameter(LOG), r"a parameter of value 2\.66\. .* logit_scale\.exp\(\)$"),
    "a number that is a logarithm": (2.66, r"only 2\.66\. .* logit_scale\.exp\(\)$"),
    "an exponential of the scale": (
        nn.Parameter(LOG).exp().exp(),
        r"1\.617e\+06, and .* no exponential of it$",
    ),
    "an infinite scale": (torch.tensor(math.inf), "inf, and CLIP models have at most 100"),
}
"""Values that are no scale, each with its warning, which says the remedy."""


@pytest.mark.filterwarnings("ignore:logit_bias")
@pytest.mark.parametrize(
    "make", [RankConsistency, ClipLoss, SigLipLoss, SpreadLoss], ids=lambda x: x.__name__
)
@pytest.mark.parametrize("name", SCALES)
def test_a_scale_that_cannot_be_one_is_a_warning_with_its_remedy(name: str, make: Any) -> None:
    scale, message = SCALES[name]
    loss = make()
    with pytest.warns(InputWarning, match=f"^logit_scale is {message}") as warned:
        loss(V, T, scale)
    # A loss and its base each warn, in the same words, of which Python shows the first: a set has them once.
    different_texts = {str(warning.message) for warning in warned}
    of_scale = [text for text in different_texts if text.startswith("logit_scale")]
    assert len(of_scale) == 1
    loss(V, T, scale)  # a second warning would be an error


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_beside_features_without_values_is_not_looked_at(name: str) -> None:
    """The function returns whether it has looked, and the loss asks it again in a later call if not."""
    scale, _ = SCALES[name]
    has_looked = checks.warn_of_scale("logit_scale", scale, V.to("meta"))
    assert has_looked is False


@pytest.mark.parametrize(
    "scale",
    [
        1.0,
        5.0,
        100.0,
        1000.0,
        pytest.param(nn.Parameter(torch.tensor(10.0)), id="a parameter"),
        pytest.param(nn.Parameter(LOG).clamp(0, 4), id="computed from a parameter"),
    ],
)
def test_a_scale_that_can_be_one_is_no_warning(scale: Any) -> None:
    """A warning would be an error."""
    has_looked = checks.warn_of_scale("logit_scale", scale, V)
    assert has_looked


# The change that spoils a teacher of nine rows, and the reason of the refusal. The largest value of row 0 of
# ``teacher_of(n=9)``'s texts is 0.727564.
SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "half of zeros": (
        lambda x: x.index_fill(0, torch.arange(4, 9), 0.0),
        "must not have rows of zeros, which rank nothing; got 5 of 9, the first is row 4",
    ),
    "NaN": (lambda x: x.index_fill(0, torch.tensor(7), math.nan), "must be finite; row 7 has norm nan"),
    "infinite": (lambda x: x.index_fill(0, torch.tensor(7), math.inf), "must be finite; row 7 has norm inf"),
    "large": (
        lambda x: x.float() * 1e30,
        "must be unit-norm; row 0 has values up to 7.27564e.29, whose squares float32",
    ),
    "small": (
        lambda x: x.float() * 1e-30,
        "must be unit-norm; row 0 has values up to 7.27564e-31, whose squares float32",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_teacher_is_an_error_whenever_it_comes(how: str) -> None:
    """In the first call, after a call without a teacher, and after another one with a good teacher."""
    inputs, teacher = random_batch(seed=0, n=9, d=4, scale=10.0).leaves(), teacher_of(n=9)
    spoil, reason = SPOILT[how]
    bad = {**teacher, TEXT: spoil(teacher[TEXT])}
    no_teacher: dict[str, Tensor] = {}
    for loss in (rank_clip_at(0.0), rank_clip_at(1.0), RankConsistency()):
        for teachers_of_earlier_calls in ([], [no_teacher], [no_teacher, teacher]):
            for earlier_teacher in teachers_of_earlier_calls:
                loss(*inputs, **earlier_teacher)
            with pytest.raises(ValueError, match=f"{TEXT} {reason}"):
                loss(*inputs, **bad)


@pytest.mark.parametrize("how", SPOILT)
def test_check_teacher_refuses_a_spoilt_teacher(how: str) -> None:
    spoil, reason = SPOILT[how]
    with pytest.raises(ValueError, match=f"{TEXT} {reason}"):
        check_teacher(TEXT, spoil(teacher_of(n=9)[TEXT]))


def test_a_teacher_of_one_row_is_warned_of_once_and_its_loss_and_gradients_are_finite() -> None:
    """In sorted data all captions of a batch may be equal: a teacher has one vector for all of them."""
    inputs, teacher = random_batch(seed=0, n=9, d=4, scale=10.0).leaves(), teacher_of(n=9)
    one_row = {**teacher, TEXT: teacher[TEXT][:1].expand_as(teacher[TEXT])}
    loss = RankConsistency()
    with pytest.warns(InputWarning, match=f"^{TEXT} are one row for all pairs of a batch"):
        value = loss(*inputs, **one_row)
    value.backward()
    assert value.isfinite()
    for leaf in inputs:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    # In a later batch, also of another size, a second warning would be an error.
    first_seven = {name: x[:7] for name, x in one_row.items()}
    loss(*random_batch(seed=0, n=7, d=4, scale=10.0).leaves(), **first_seven)


def test_norms_of_a_teacher_that_comes_later_are_warned_of_once() -> None:
    loss = RankConsistency()
    loss(V, T, S)
    large = {name: 3 * x for name, x in teacher_of(n=6).items()}
    with pytest.warns(InputWarning) as warned:
        loss(V, T, S, **large)
    assert [str(warning.message).split()[0] for warning in warned] == [IMAGE, TEXT]
    loss(V, T, S, **large)  # a second warning would be an error
