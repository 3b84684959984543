"""Real gloo processes against one process: what the losses make of a batch that is spread over ranks."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import TestCase, mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import one_process
from batches import assert_same, random_batch
from collectives import Collectives
from drawn_options import CHANGES
from one_process import View
from process_pool import Pools
from rankloss import (
    ClipLoss,
    Gather,
    MimicryLoss,
    RankClipLoss,
    RankConsistency,
    RankedLists,
    SigLipLoss,
    SpreadLoss,
    distributed,
)
from rankloss.distributed import all_gather, gather_once
from rankloss.losses import GatheringLoss
from rankloss_trainers import catalog
from rankloss_trainers.graded.term import RankedListsTerm
from registered import OF_PACKAGES, input_names
from subjects import SUBJECTS

N, D, SCALE = 4, 6, 10.0  # pairs of a process
TEACHER = ("reference_image_features", "reference_text_features")
F64, F32 = torch.float64, torch.float32

Values = list[Tensor]  # a value, then its gradients by images, texts, scale and bias, or a part of these


# --- the losses, and what they owe ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A loss of pairs, and what one process owes in it."""

    build: Callable[[Any], nn.Module]
    """Of the option ``gather``."""
    owed: Callable[[View, Tensor], Tensor]
    """The value for a process's view of the batch and the bias, in plain torch."""
    checks: int = 1
    """The losses in it that are called: each compares its inputs once.

    RankClipLoss computes CLIP's own loss in its pass, and does not call it.
    """
    has_ids: bool = False
    gathers_pairs_alone: bool = True
    """Whether its messages are the features', the ids' and the checks' alone, each once."""


def clip_of(view: View, bias: Tensor, **options: Any) -> Tensor:
    """CLIP's loss, in which a bias has a gradient of zero."""
    return one_process.clip(view, **options) + 0 * bias


def ids_of(images: Tensor) -> Tensor:
    """Ids of few values, the same wherever an image is."""
    return 2 * (images[:, 0] > 0) - 3 * (images[:, 1] > 0)


def pair_ids(v: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {"pair_ids": ids_of(v)}


def teacher_features(v: Tensor, t: Tensor) -> dict[str, Tensor]:
    """A teacher whose features are the student's, reversed."""
    return dict(zip(TEACHER, (x.detach().flip(-1) for x in (v, t)), strict=True))


def teacher_view(view: View) -> View:
    """What the teacher of :func:`teacher_features` makes of the same pairs."""
    image, text = teacher_features(view.image, view.text).values()
    return View(image, text, view.scale, image[view.rows], text[view.rows], view.first)


class WithInputs(nn.Module):
    """A loss with further inputs, made of its features."""

    def __init__(self, inputs_of: Callable[[Tensor, Tensor], dict[str, Tensor]], loss: nn.Module) -> None:
        super().__init__()
        self.inputs_of, self.loss = inputs_of, loss

    def forward(self, v: Tensor, t: Tensor, *numbers: Tensor, **more: Tensor) -> Any:
        return self.loss(v, t, *numbers, **more, **self.inputs_of(v, t))


class OfMoreDimensions(nn.Module):
    """A loss of the same similarities in three times the dimensions, more than there are pairs."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, v: Tensor, t: Tensor, *numbers: Tensor, **more: Tensor) -> Any:
        wide = [x.repeat(1, 3) / math.sqrt(3) for x in (v, t)]
        return self.loss(*wide, *numbers, **more)


class OwnRows(GatheringLoss):
    """CLIP's loss as a loss of rows, as another package would write it."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        inputs = image_features, text_features, logit_scale, logit_bias
        return self.streamed(
            lambda scores, row: scores.logsumexp(-1) - scores.diagonal(row), *inputs, chunk_size=3
        )


def rank_clip(base: nn.Module | None, gather: Any) -> nn.Module:
    return RankClipLoss(base, schedule="constant", normalizer=1.0, gather=gather)


MIMICRY_WEIGHT, SPREAD_WEIGHT = 8.0, 0.3  # the defaults


def mimicry(base: nn.Module | None, gather: Any) -> nn.Module:
    return WithInputs(teacher_features, MimicryLoss(base, gather=gather))


def mimicry_terms(view: View) -> Tensor:
    teacher = teacher_view(view)
    images = (view.image_anchors - teacher.image_anchors).square().sum(-1).mean()
    texts = (view.text_anchors - teacher.text_anchors).square().sum(-1).mean()
    return MIMICRY_WEIGHT * (images + texts)


def mimicry_and_taught_ranks(view: View, bias: Tensor) -> Tensor:
    return one_process.clip(view) + mimicry_terms(view) + one_process.rank_terms(view, teacher_view(view))


def spread_of_clip(view: View, bias: Tensor) -> Tensor:
    return one_process.clip(view) + SPREAD_WEIGHT * one_process.spread(view)


def case_with_ids(
    build: Callable[..., nn.Module], owed: Callable[..., Tensor], same_id: str, **options: Any
) -> Case:
    """The case of a loss whose inputs have ids, which it uses as ``same_id`` says.

    Args:
        build: The loss, of its options.
        owed: Its value in one process for a view, the bias, ``ids`` and ``same_id``.
        same_id: ``"ignore"`` or ``"share"``.
        **options: Further options of the loss.
    """

    def owed_with_ids(view: View, bias: Tensor) -> Tensor:
        return owed(view, bias, ids=ids_of(view.image), same_id=same_id)

    return Case(
        lambda gather: WithInputs(pair_ids, build(same_id=same_id, gather=gather, **options)),
        owed_with_ids,
        has_ids=True,
    )


ChunkedRankConsistency = functools.partial(RankConsistency, chunk_size=3)  # fewer rows than pairs
smoothed_clip_of = functools.partial(clip_of, label_smoothing=0.2)
LOSSES = {
    "ClipLoss": Case(lambda gather: ClipLoss(gather=gather), clip_of),
    "ClipLoss[streamed]": Case(lambda gather: ClipLoss(gather=gather, memory_budget=0), clip_of),
    "ClipLoss[smoothed, streamed]": Case(
        lambda gather: ClipLoss(gather=gather, label_smoothing=0.2, memory_budget=0), smoothed_clip_of
    ),
    "a loss of rows": Case(lambda gather: OwnRows(gather=gather), clip_of),
    "SigLipLoss": Case(lambda gather: SigLipLoss(gather=gather), one_process.siglip),
    "SigLipLoss[streamed]": Case(
        lambda gather: SigLipLoss(gather=gather, memory_budget=0), one_process.siglip
    ),
    "RankConsistency[cross-modal]": Case(
        lambda gather: ChunkedRankConsistency(gather=gather, in_modal=0),
        lambda view, bias: one_process.cross_modal(view),
    ),
    "RankConsistency[in-modal]": Case(
        lambda gather: ChunkedRankConsistency(gather=gather, cross_modal=0),
        lambda view, bias: one_process.in_modal(view),
    ),
    "RankClipLoss": Case(
        lambda gather: rank_clip(None, gather), lambda view, bias: one_process.rank_clip(view)
    ),
    "RankClipLoss[over SigLipLoss]": Case(
        lambda gather: rank_clip(SigLipLoss(gather=gather), gather),
        lambda view, bias: one_process.siglip(view, bias) + one_process.rank_terms(view),
        checks=2,
        gathers_pairs_alone=False,
    ),
    "RankClipLoss[over ClipLoss of ids]": Case(
        lambda gather: WithInputs(pair_ids, rank_clip(ClipLoss(same_id="ignore", gather=gather), gather)),
        lambda view, bias: (
            clip_of(view, bias, ids=ids_of(view.image), same_id="ignore") + one_process.rank_terms(view)
        ),
        checks=2,
        has_ids=True,
    ),
    "MimicryLoss[default]": Case(
        lambda gather: mimicry(None, gather),
        lambda view, bias: one_process.clip(view) + mimicry_terms(view),
        checks=2,
        gathers_pairs_alone=False,
    ),
    "MimicryLoss[under RankClipLoss]": Case(
        lambda gather: WithInputs(teacher_features, rank_clip(MimicryLoss(gather=gather), gather)),
        mimicry_and_taught_ranks,
        checks=3,
        gathers_pairs_alone=False,
    ),
    "MimicryLoss[over RankClipLoss]": Case(
        lambda gather: mimicry(rank_clip(None, gather), gather),
        mimicry_and_taught_ranks,
        checks=2,
        gathers_pairs_alone=False,
    ),
    "SpreadLoss[covariance]": Case(
        lambda gather: SpreadLoss(gather=gather), spread_of_clip, checks=2, gathers_pairs_alone=False
    ),
    "SpreadLoss[similarities]": Case(
        lambda gather: OfMoreDimensions(SpreadLoss(gather=gather)),
        spread_of_clip,
        checks=2,
        gathers_pairs_alone=False,
    ),
    "SpreadLoss[over SigLipLoss]": Case(
        lambda gather: SpreadLoss(SigLipLoss(gather=gather), gather=gather),
        lambda view, bias: one_process.siglip(view, bias) + SPREAD_WEIGHT * one_process.spread(view),
        checks=2,
        gathers_pairs_alone=False,
    ),
}
"""By the names of the subjects of other tests, where they are the same."""
BUDGETS = {"": None, ", streamed": 0}  # of the bytes of a whole matrix, by what it adds to a name
for same_id, (streamed, budget) in itertools.product(("ignore", "share"), BUDGETS.items()):
    LOSSES |= {
        f"ClipLoss[{same_id}{streamed}]": case_with_ids(ClipLoss, clip_of, same_id, memory_budget=budget),
        f"ClipLoss[smoothed, {same_id}{streamed}]": case_with_ids(
            ClipLoss, smoothed_clip_of, same_id, memory_budget=budget, label_smoothing=0.2
        ),
        f"SigLipLoss[{same_id}{streamed}]": case_with_ids(
            SigLipLoss, one_process.siglip, same_id, memory_budget=budget
        ),
    }


def is_siglip(loss: str) -> bool:
    """True for SigLIP's loss alone."""
    return loss.startswith("SigLipLoss")


FLAGS: dict[str, Gather] = {
    "global loss, constants": Gather(local_loss=False, gather_with_grad=False),
    "global loss, gradients": Gather(local_loss=False, gather_with_grad=True),
    "local loss, constants": Gather(local_loss=True, gather_with_grad=False),
    "local loss, gradients": Gather(local_loss=True, gather_with_grad=True),
}
"""All flags: of whose rows a process computes the loss, and what other processes' features are in it."""
WITH_GRADIENTS = ("global loss, gradients", "local loss, gradients")
DEFAULT_FLAGS = "local loss, gradients"


def whole_batch(
    world_size: int, dtype: torch.dtype = F64, *, pairs: int = N, seed: int = 0, duplicates: int = 0
) -> tuple[Tensor, ...]:
    """Images and texts of the whole batch, ``pairs`` of each process, then the scale and the bias.

    All are leaves that require a gradient.
    """
    batch = random_batch(seed, pairs * world_size, D, SCALE, duplicates=duplicates)
    return (*batch.leaves(dtype), torch.tensor(-2.0, dtype=dtype, requires_grad=True))


def shards(rank: int, world_size: int, *whole: Tensor) -> list[Tensor]:
    """This rank's share of each tensor."""
    return [x.chunk(world_size)[rank] for x in whole]


def value_of(loss: nn.Module, v: Tensor, t: Tensor, s: Tensor, b: Tensor, **more: Any) -> Tensor:
    """The loss's value; the bias is for losses that take one."""
    if not isinstance(loss, RankConsistency):
        more["logit_bias"] = b
    return loss(v, t, s, **more)


def value_and_gradients(value: Tensor, inputs: tuple[Tensor, ...]) -> Values:
    """The value and its gradients, zeros by inputs that it does not depend on."""
    gradients = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def mean_of_ranks(results: list[Values]) -> Values:
    """DDP's mean of the ranks' values."""
    return [torch.stack(of_ranks).mean(0) for of_ranks in zip(*results, strict=True)]


def expected_of(loss: str, inputs: tuple[Tensor, ...], world_size: int, flags: str = DEFAULT_FLAGS) -> Values:
    """The mean of ``world_size`` processes' losses and its gradients, in plain torch in this process.

    With one process that is the loss of the whole batch.
    """
    *features_and_scale, bias = inputs
    owed = functools.partial(LOSSES[loss].owed, bias=bias)
    gather = FLAGS[flags]
    mean = one_process.mean_loss(
        owed, tuple(features_and_scale), world_size, gather.local_loss, gather.gather_with_grad
    )
    return value_and_gradients(mean, inputs)


# --- every loss in every layout -----------------------------------------------------------------------------


def parity_group(rank: int, world_size: int) -> Any:
    """This process's group, the even or the odd ranks: its ranks are not the default group's."""
    groups = [dist.new_group(list(range(parity, world_size, 2))) for parity in range(min(2, world_size))]
    return groups[rank % 2]


def results_of_every_layout(rank: int, world_size: int) -> dict[tuple[str, str], Values]:
    """By loss and layout, this rank's value of its share of the batch, and its gradients by the whole batch.

    Layouts are the names of ``FLAGS``, "default", "group" (the batch of the rank's parity group) and
    "inference mode", which has the value alone.
    """
    group = parity_group(rank, world_size)
    group_rank, group_size = dist.get_rank(group), dist.get_world_size(group)
    whole = whole_batch(world_size)
    v, t, *numbers = whole
    share = shards(rank, world_size, v, t)
    of_group = whole_batch(group_size, seed=rank % 2)
    group_share = shards(group_rank, group_size, *of_group[:2])
    results: dict[tuple[str, str], Values] = {}
    for name, case in LOSSES.items():
        for flags, gather in FLAGS.items():
            value = value_of(case.build(gather), *share, *numbers)
            results[name, flags] = value_and_gradients(value, whole)
        results[name, "default"] = value_and_gradients(value_of(case.build(None), *share, *numbers), whole)
        value = value_of(case.build(Gather(group=group)), *group_share, *of_group[2:])
        results[name, "group"] = value_and_gradients(value, of_group)
        with torch.inference_mode():
            results[name, "inference mode"] = [value_of(case.build(None), *share, *numbers)]
    return results


def test_every_variant_of_a_loss_of_pairs_is_in_the_table() -> None:
    """Whoever adds one to the subjects of the other tests is told to add it here, by the same name.

    Of the rank terms alone, ``SHARDED`` has each option.
    """
    subjects = [subject for subject in SUBJECTS if subject.takes_pairs and subject.covers]
    variants = {subject.name for subject in subjects if subject.covers != "RankConsistency"}
    assert variants - LOSSES.keys() == set()


@pytest.fixture(scope="module", params=[1, 2, 3])
def results_by_rank(request: pytest.FixtureRequest, pools: Pools) -> list[dict[tuple[str, str], Values]]:
    """By rank the results of :func:`results_of_every_layout`, for each number of processes in turn."""
    return pools[request.param].run(results_of_every_layout)


every_loss = pytest.mark.parametrize("loss", LOSSES)


def mean_over_ranks(results_by_rank: list[dict[tuple[str, str], Values]], loss: str, layout: str) -> Values:
    return mean_of_ranks([of_rank[loss, layout] for of_rank in results_by_rank])


@every_loss
@pytest.mark.parametrize("layout", [*FLAGS, "default"])
def test_value_and_gradients_follow_the_flags_rules(
    results_by_rank: list[Any], loss: str, layout: str
) -> None:
    """The rules are those of ``one_process.mean_loss``, which makes each process's view of the batch."""
    world_size = len(results_by_rank)
    flags = DEFAULT_FLAGS if layout == "default" else layout
    owed = expected_of(loss, whole_batch(world_size), world_size, flags)
    assert_same(mean_over_ranks(results_by_rank, loss, layout), owed)


@every_loss
def test_value_and_the_numbers_gradients_are_the_whole_batchs_under_all_flags(
    results_by_rank: list[Any], loss: str
) -> None:
    """The numbers are the scale and the bias."""
    expected, _, _, expected_by_scale, expected_by_bias = expected_of(
        loss, whole_batch(len(results_by_rank)), world_size=1
    )
    for flags in FLAGS:
        value, _, _, by_scale, by_bias = mean_over_ranks(results_by_rank, loss, flags)
        assert_same([value, by_scale, by_bias], [expected, expected_by_scale, expected_by_bias])


@every_loss
def test_features_that_are_gathered_with_their_graph_have_the_whole_batchs_gradients(
    results_by_rank: list[Any], loss: str
) -> None:
    owed = expected_of(loss, whole_batch(len(results_by_rank)), world_size=1)
    for flags in WITH_GRADIENTS:
        assert_same(mean_over_ranks(results_by_rank, loss, flags), owed)


@every_loss
def test_a_global_loss_of_constants_divides_the_features_gradients_by_the_processes(
    results_by_rank: list[Any], loss: str
) -> None:
    """Those of all terms alike, so that no term gains weight over another by the flags of a launch."""
    _, by_image, by_text, *_ = mean_over_ranks(results_by_rank, loss, "global loss, constants")
    _, owed_by_image, owed_by_text, *_ = expected_of(loss, whole_batch(len(results_by_rank)), world_size=1)
    assert_same(
        [by_image, by_text], [owed_by_image / len(results_by_rank), owed_by_text / len(results_by_rank)]
    )


@every_loss
def test_a_loss_of_a_group_is_that_of_the_groups_batch(results_by_rank: list[Any], loss: str) -> None:
    for parity, of_group in enumerate((results_by_rank[::2], results_by_rank[1::2])):
        if of_group:  # one process has no odd rank
            owed = expected_of(loss, whole_batch(len(of_group), seed=parity), world_size=1)
            assert_same(mean_over_ranks(of_group, loss, "group"), owed)


@every_loss
def test_the_value_in_inference_mode_is_the_whole_batchs(results_by_rank: list[Any], loss: str) -> None:
    (value,) = mean_over_ranks(results_by_rank, loss, "inference mode")
    expected, *_ = expected_of(loss, whole_batch(len(results_by_rank)), world_size=1)
    assert_same([value], [expected])


@dataclass(frozen=True)
class ShardedCase:
    """Rank terms with some options, of a batch that is spread over processes."""

    options: dict[str, Any] = field(default_factory=dict)
    teacher: tuple[str, ...] = ()
    pairs: int = N
    """Of a process."""
    duplicates: int = 2
    """Texts of the whole batch that repeat earlier ones."""
    dtype: torch.dtype = F64


SHARDED = {
    **{
        str(options): ShardedCase(options, teacher=TEACHER if "reference_scale" in options else ())
        for options in ({}, *CHANGES)
    },
    "teacher": ShardedCase(teacher=TEACHER),
    "teacher of texts": ShardedCase({"cross_modal": 0.0}, teacher=TEACHER[1:]),
    "one pair": ShardedCase(pairs=1, duplicates=0),
    "float32": ShardedCase(dtype=F32),
}


def value_of_share(
    case: ShardedCase,
    gather: Any,
    inputs: tuple[Tensor, ...],
    teacher: dict[str, Tensor],
    rank: int,
    world_size: int,
) -> Values:
    """The rank terms of a rank's share of the inputs, and their gradients by all of them."""
    loss = ChunkedRankConsistency(gather=gather, **case.options)
    v, t, *numbers = inputs
    share = shards(rank, world_size, v, t)
    teachers_share = dict(zip(teacher, shards(rank, world_size, *teacher.values()), strict=True))
    with Collectives() as calls:
        value = value_of(loss, *share, *numbers, **teachers_share)
    assert bool(calls.counts) == (world_size > 1)  # one process sends nothing
    if value.dim():  # a value per anchor: sum them, each with a weight of its own
        (weights,) = shards(rank, world_size, torch.arange(1.0, 1 + len(v)))
        value = world_size * (weights * value).sum()  # so that the mean over the ranks is the sum of all
    return value_and_gradients(value, inputs)


def values_of_share_and_whole(rank: int, world_size: int) -> dict[str, tuple[Values, Values]]:
    """This rank's values of its share, beside those of one process that has the whole batch."""
    results = {}
    for name, case in SHARDED.items():
        inputs = whole_batch(world_size, case.dtype, pairs=case.pairs, duplicates=case.duplicates)
        wide = random_batch(seed=1, n=case.pairs * world_size, d=9, scale=1.0, duplicates=1)
        teacher = dict(zip(TEACHER, (wide.image, wide.text), strict=True))
        teacher = {modality: teacher[modality] for modality in case.teacher}
        results[name] = (
            value_of_share(case, None, inputs, teacher, rank, world_size),
            value_of_share(case, False, inputs, teacher, rank=0, world_size=1),
        )
    return results


@pytest.fixture(scope="module", params=[2, 3])
def shares_and_wholes(request: pytest.FixtureRequest, pools: Pools) -> list[dict[str, Any]]:
    """By rank the results of :func:`values_of_share_and_whole`, for each number of processes in turn."""
    return pools[request.param].run(values_of_share_and_whole)


@pytest.mark.parametrize("name", SHARDED)
def test_with_every_option_the_mean_of_shares_is_the_whole_batchs(
    shares_and_wholes: list[dict[str, Any]], name: str
) -> None:
    """Values and gradients, averaged over the ranks, are those of one process with all pairs."""
    of_shares = [of_rank[name][0] for of_rank in shares_and_wholes]
    _, expected = shares_and_wholes[0][name]  # every rank has computed the same of the whole batch
    tolerance = 1e-5 if SHARDED[name].dtype == F32 else 1e-10
    assert_same(mean_of_ranks(of_shares), expected, tolerance)


# --- under DistributedDataParallel ------------------------------------------------------------------------


class Towers(nn.Module):
    """A linear model of images and texts, with a scale that is trained, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(5, D, bias=False, dtype=F64) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=F64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.logit_scale.exp()


def train(rank: int, world_size: int, gather: Gather | None) -> tuple[Values, dict[str, int]]:
    """A few steps of SGD with the ranking loss: the weights at the end, and the last step's collectives."""
    model = Towers()
    towers = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = RankClipLoss(normalizer=1.0, gather=gather)
    for step in range(1, 4):
        criterion.set_progress(step=step, total_steps=3)
        optimizer.zero_grad()
        batch = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(step), dtype=F64)
        with Collectives() as calls:
            criterion(*towers(*shards(rank, world_size, *batch))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], dict(calls.counts)


@pytest.fixture(scope="module", params=[None, Gather(local_loss=False)], ids=["default", "global loss"])
def trained(request: pytest.FixtureRequest, pools: Pools) -> list[tuple[Values, dict[str, int]]]:
    """By rank of three processes, each with a third of every batch."""
    return pools[3].run(train, request.param)


def test_training_ends_at_the_single_process_weights(trained: list[tuple[Values, dict[str, int]]]) -> None:
    expected, _ = train(rank=0, world_size=1, gather=None)
    for weights, _ in trained:
        assert_same(weights, expected)
    # And these are no longer the weights at the start.
    for end, start in zip(expected, Towers().parameters(), strict=True):
        assert (end - start).norm() > 1e-3 * start.norm()


def test_a_training_step_has_one_check_and_two_gatherings(
    trained: list[tuple[Values, dict[str, int]]],
) -> None:
    modalities = 2
    of_check, of_backward_pass, of_ddp = 1, modalities, 1  # all parameters fit one of DDP's buckets
    for _, calls in trained:
        assert calls["allgather"] == modalities
        assert calls["allreduce"] == of_check + of_backward_pass + of_ddp


# --- the collectives --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """What a process has made of ``all_gather``; x is [1 + rank, 0.5] there."""

    items: Tensor
    """x of all ranks."""
    first: Tensor
    """The gradient by x of Σ_r w_r·items, in which rank r weighs item k by (r + 1)·(k + 1)."""
    keeps_gradient: bool
    """Whether the gradient of the gathered items is still the rank's own after the reduction."""
    second: Tensor
    """The gradient by x of the squared gradient of (r + 1)·Σ items³."""
    half: Tensor
    """A gradient in bfloat16, to which one rank gives 256 and the others 1."""
    of_group: Tensor
    """x of the even or the odd ranks."""
    is_own: bool
    """Whether the group's items are x itself."""


def gatherings(rank: int, world_size: int) -> dict[str, Any]:
    """The fields of :class:`Gathered`."""
    x = torch.tensor([[1.0 + rank], [0.5]], dtype=F64, requires_grad=True)
    items = all_gather(x)
    weights = (rank + 1) * torch.arange(1, len(items) + 1.0)[:, None]
    first, by_items = torch.autograd.grad((weights * items).sum(), (x, items))
    sum_of_cubes = all_gather(x).pow(3).sum()
    (gradient,) = torch.autograd.grad((rank + 1) * sum_of_cubes, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
    zeros = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    is_large = torch.arange(2 * world_size) % world_size == rank
    upstream = torch.where(is_large, 256.0, 1.0).bfloat16()
    (half,) = torch.autograd.grad(all_gather(zeros), zeros, upstream)
    group = parity_group(rank, world_size)
    return {
        "items": items,
        "first": first,
        "keeps_gradient": torch.equal(by_items, weights),
        "second": second,
        "half": half,
        "of_group": all_gather(x[:1], group),
        "is_own": all_gather(x, group) is x,
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def gathered(request: pytest.FixtureRequest, pools: Pools) -> list[Gathered]:
    """By rank, for each number of processes."""
    return [Gathered(**of_rank) for of_rank in pools[request.param].run(gatherings)]


def test_all_gather_concatenates(gathered: list[Gathered]) -> None:
    expected = [x for rank in range(len(gathered)) for x in (1.0 + rank, 0.5)]
    for of_rank in gathered:
        assert of_rank.items.flatten().tolist() == expected


def test_gradients_of_all_gather_add_up_over_the_ranks(gathered: list[Gathered]) -> None:
    """Rank r weighs item k by (r + 1)·(k + 1), and a rank's own two items are k = 2·rank and the next."""
    total = sum(range(1, len(gathered) + 1))  # of the factors r + 1
    for rank, of_rank in enumerate(gathered):
        assert of_rank.first.flatten().tolist() == [total * (2.0 * rank + 1), total * (2.0 * rank + 2)]


def test_the_reduction_leaves_the_gradient_of_the_gathered_items_as_it_was(gathered: list[Gathered]) -> None:
    assert all(of_rank.keeps_gradient for of_rank in gathered)


def test_second_derivatives_of_all_gather_add_up_over_the_ranks(gathered: list[Gathered]) -> None:
    """Σ_r L_r = total·Σ x³ has the gradient 3·total·x², whose square is 9·total²·x⁴."""
    total = sum(range(1, len(gathered) + 1))  # of the factors r + 1
    for rank, of_rank in enumerate(gathered):
        expected = [36 * total**2 * x**3 for x in (1.0 + rank, 0.5)]
        assert of_rank.second.flatten().tolist() == pytest.approx(expected)


def test_gradients_of_half_precision_are_added_in_float32(gathered: list[Gathered]) -> None:
    """Of three processes: 256 + 1 is 256 in bfloat16, but 256 + 1 + 1 in float32 is 258."""
    sum_of_ranks = 256.0 + (len(gathered) - 1)
    expected = torch.full((2,), sum_of_ranks).bfloat16()
    for of_rank in gathered:
        assert of_rank.half.dtype == torch.bfloat16
        assert torch.equal(of_rank.half, expected)


def test_all_gather_of_a_group_is_of_its_members_alone(gathered: list[Gathered]) -> None:
    for rank, of_rank in enumerate(gathered):
        members = range(rank % 2, len(gathered), 2)
        assert of_rank.of_group.flatten().tolist() == [1.0 + member for member in members]
        assert of_rank.is_own == (len(members) == 1)


WORLD_SIZE_OF_STEPS = 2


@dataclass(frozen=True)
class Step:
    """A process's step: the collectives, and the value with its gradients."""

    loss: str
    local_loss: bool
    gather_with_grad: bool
    forward: dict[str, int]
    """Calls by their names."""
    filled: int
    """Bytes of the tensors that these fill."""
    backward: dict[str, int]
    values: Values

    @property
    def modalities(self) -> int:
        """The number that is gathered: two, but SigLIP's loss of a process's own images needs texts alone."""
        return 1 if is_siglip(self.loss) and self.local_loss else 2

    @property
    def bytes_of_features(self) -> int:
        """Of all processes."""
        return self.modalities * WORLD_SIZE_OF_STEPS * N * D * F64.itemsize

    @property
    def bytes_of_checks(self) -> int:
        """Each check sums three numbers of 8 bytes."""
        return 3 * 8 * LOSSES[self.loss].checks


def second_steps(rank: int, world_size: int, one_tensor: bool = False) -> list[dict[str, Any]]:
    """The fields of :class:`Step` for every loss under all flags.

    Of a second step: in the first one, processes get to know each other. With ``one_tensor`` by collectives
    that fill one tensor, as NCCL has them.
    """
    steps = []
    as_on_nccl = mock.patch.object(distributed, "_has_tensor_collectives", return_value=True)
    with as_on_nccl if one_tensor else nullcontext():
        for gather, (name, case) in itertools.product(FLAGS.values(), LOSSES.items()):
            v, t, *numbers = inputs = whole_batch(world_size)
            share = shards(rank, world_size, v, t)
            loss = case.build(gather)
            value_of(loss, *share, *numbers)  # the first step
            with Collectives() as forward:
                value = value_of(loss, *share, *numbers)
            with Collectives() as backward:
                values = value_and_gradients(value, inputs)
            step = {
                "loss": name,
                "local_loss": gather.local_loss,
                "gather_with_grad": gather.gather_with_grad,
                "forward": dict(forward.counts),
                "filled": forward.filled.total(),
                "backward": dict(backward.counts),
                "values": values,
            }
            steps.append(step)
    return steps


def steps_of(pools: Pools, one_tensor: bool) -> list[Step]:
    """The steps of both processes, one after the other."""
    of_ranks = pools[WORLD_SIZE_OF_STEPS].run(second_steps, one_tensor)
    return [Step(**step) for of_rank in of_ranks for step in of_rank]


@pytest.fixture(scope="module")
def steps(pools: Pools) -> list[Step]:
    return steps_of(pools, one_tensor=False)


@pytest.fixture(scope="module")
def steps_of_pairs_alone(steps: list[Step]) -> list[Step]:
    """The steps that have no other messages than the features', the ids' and the checks'."""
    return [step for step in steps if LOSSES[step.loss].gathers_pairs_alone]


SUMS_OF_SPREAD = 4  # a mean and a covariance of each modality
LOSSES_WITH_SUMS = ("SpreadLoss[covariance]", "SpreadLoss[over SigLipLoss]")


def test_every_loss_that_is_called_compares_its_inputs_once(steps: list[Step]) -> None:
    """Beside the sums that a spread from covariances reduces."""
    for step in steps:
        sums = SUMS_OF_SPREAD if step.loss in LOSSES_WITH_SUMS else 0
        assert step.forward["allreduce"] == sums + LOSSES[step.loss].checks, step


def test_a_step_gathers_each_modality_and_the_ids_once(steps_of_pairs_alone: list[Step]) -> None:
    for step in steps_of_pairs_alone:
        assert step.forward["allgather"] == step.modalities + LOSSES[step.loss].has_ids, step


def test_a_step_fills_the_bytes_of_features_ids_and_checks_alone(steps_of_pairs_alone: list[Step]) -> None:
    for step in steps_of_pairs_alone:
        bytes_of_ids = WORLD_SIZE_OF_STEPS * N * torch.int64.itemsize if LOSSES[step.loss].has_ids else 0
        assert step.filled == step.bytes_of_features + bytes_of_ids + step.bytes_of_checks, step


def test_the_gradient_of_each_gathered_modality_is_reduced_once(steps_of_pairs_alone: list[Step]) -> None:
    for step in steps_of_pairs_alone:
        assert step.backward == ({"allreduce": step.modalities} if step.gather_with_grad else {}), step


def steps_named(steps: list[Step], loss: str) -> list[Step]:
    return [step for step in steps if step.loss == loss]


def test_mimicry_gathers_distances_where_all_rows_are_computed(steps: list[Step]) -> None:
    """Beside the two modalities that its base gathers."""
    for step in steps_named(steps, "MimicryLoss[default]"):
        distances = 0 if step.local_loss else 1
        assert step.forward["allgather"] == 2 + distances


def test_a_spread_of_more_dimensions_than_pairs_gathers_nothing_beside_its_base(steps: list[Step]) -> None:
    """The base gathers the two modalities."""
    for step in steps_named(steps, "SpreadLoss[similarities]"):
        assert step.forward["allgather"] == 2


def test_the_spread_gathers_deviations_where_all_rows_are_computed(steps: list[Step]) -> None:
    """Beside the two modalities that its base gathers."""
    for step in steps_named(steps, "SpreadLoss[covariance]"):
        deviations = 0 if step.local_loss else 2
        assert step.forward["allgather"] == 2 + deviations


def test_sums_of_the_spread_are_reduced_backward_unless_other_items_are_constants(steps: list[Step]) -> None:
    for step in steps_named(steps, "SpreadLoss[covariance]"):
        deviations = 0 if step.local_loss else 2
        are_constants = step.local_loss and not step.gather_with_grad
        of_sums = 0 if are_constants else SUMS_OF_SPREAD
        of_features = 2 + deviations if step.gather_with_grad else 0
        assert step.backward.get("allreduce", 0) == of_sums + of_features


@pytest.fixture(scope="module")
def one_tensor_steps(pools: Pools) -> list[Step]:
    if not hasattr(dist, "all_gather_single"):
        pytest.skip("this gloo does not reduce into one tensor")
    return steps_of(pools, one_tensor=True)


def test_collectives_of_one_tensor_give_the_same_values_and_gradients(
    one_tensor_steps: list[Step], steps: list[Step]
) -> None:
    for step, plain in zip(one_tensor_steps, steps, strict=True):
        assert_same(step.values, plain.values, tolerance=1e-14)


@pytest.mark.parametrize("loss", ["ClipLoss", "RankClipLoss"])
def test_collectives_of_one_tensor_fill_no_more_and_scatter_the_gradients(
    one_tensor_steps: list[Step], loss: str
) -> None:
    for step in steps_named(one_tensor_steps, loss):
        assert step.filled == step.bytes_of_features + step.bytes_of_checks
        assert all("reduce_scatter" in call for call in step.backward)
        assert sum(step.backward.values()) == (step.modalities if step.gather_with_grad else 0)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("nccl", "cuda", True),
        ("gloo", "cuda", False),
        ("cpu:gloo,cuda:nccl", "cuda", True),
        ("cpu:gloo,cuda:nccl", "cpu", False),
        ("undefined", "cuda", True),
    ],
)
def test_collectives_are_chosen_by_the_backend_of_the_device(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, expected: bool
) -> None:
    """True where one tensor is filled; ``backend`` is as torch reports that of a group, or those."""
    monkeypatch.setattr(dist, "get_backend", lambda _: backend)
    features = SimpleNamespace(is_cpu=device == "cpu")
    assert distributed._has_tensor_collectives(features, group=None) is expected


def two_losses(rank: int, world_size: int, epoch: int) -> list[tuple[dict[str, int], Values, Values]]:
    """By flags: the collectives and values of two losses that gather once, and the values without that.

    In the first of the two epochs λ is 0, and RankClipLoss computes its base alone; in the second it is 1.
    """
    inputs = v, t, s, _ = whole_batch(world_size)
    share = shards(rank, world_size, v, t)
    results = []
    for gather in FLAGS.values():
        rank_clip_loss = RankClipLoss(schedule="linear", gather=gather)
        rank_clip_loss.set_epoch(epoch, epochs=2)
        losses = rank_clip_loss, RankConsistency(gather=gather)
        separate = sum(loss(*share, s) for loss in losses)
        with Collectives() as calls, gather_once():
            shared = sum(loss(*share, s) for loss in losses)
        values, values_of_separate = (value_and_gradients(total, inputs) for total in (shared, separate))
        results.append((dict(calls.counts), values, values_of_separate))
    return results


# Each loss that is called checks its inputs once: the base of RankClipLoss is, as a third, where λ is 0.
@pytest.mark.parametrize(("epoch", "checks"), [(1, 3), (2, 2)], ids=["λ is 0", "λ is 1"])
def test_one_gathering_serves_several_losses(pools: Pools, epoch: int, checks: int) -> None:
    for of_rank in pools[2].run(two_losses, epoch):
        for counts, shared, separate in of_rank:
            assert counts == {"allgather": 2, "allreduce": checks}  # images and texts, each gathered once
            assert_same(shared, separate, tolerance=1e-14)


def eager_and_compiled(rank: int, world_size: int, name: str, backend: str) -> tuple[Values, Values]:
    """A loss's value and gradients on this rank, called as it is and by ``torch.compile``."""
    v, t, *numbers = inputs = whole_batch(world_size)
    share = shards(rank, world_size, v, t)
    eager = LOSSES[name].build(None)
    torch._dynamo.reset()  # of what tests before have compiled
    compiled = torch.compile(eager, backend=backend)  # with graph breaks around the collectives
    of_eager, of_compiled = (
        value_and_gradients(value_of(loss, *share, *numbers), inputs) for loss in (eager, compiled)
    )
    return of_eager, of_compiled


@pytest.mark.parametrize(
    ("loss", "backend"), [("SigLipLoss[streamed]", "eager"), ("RankClipLoss", "aot_eager")]
)
def test_a_loss_under_a_compiler_has_the_eager_values_and_gradients_on_several_processes(
    pools: Pools, loss: str, backend: str
) -> None:
    for eager, compiled in pools[2].run(eager_and_compiled, loss, backend):
        assert_same(compiled, eager)


# --- open_clip's losses -----------------------------------------------------------------------------------


def pairs_with_open_clip(rank: int, world_size: int) -> Iterator[tuple[nn.Module, nn.Module]]:
    """open_clip's losses, each with ours of the same flags."""
    from open_clip import loss as open_clip

    place = {"rank": rank, "world_size": world_size}
    for gather in FLAGS.values():
        flags = {"local_loss": gather.local_loss, "gather_with_grad": gather.gather_with_grad}
        yield open_clip.ClipLoss(**place, **flags), ClipLoss(gather=Gather(**place, **flags))
    for exchange, budget in itertools.product(("bidir", "shift", "reduce", "gather"), (0, None)):
        ours = SigLipLoss(gather=Gather(**place), memory_budget=budget)
        yield open_clip.SigLipLoss(**place, dist_impl=exchange), ours


def beside_open_clip(rank: int, world_size: int) -> list[tuple[Values, Values]]:
    """What open_clip's losses and ours make of this rank's share."""
    v, t, *numbers = inputs = whole_batch(world_size)
    share = shards(rank, world_size, v, t)
    return [
        (
            value_and_gradients(value_of(theirs, *share, *numbers), inputs),
            value_and_gradients(value_of(ours, *share, *numbers), inputs),
        )
        for theirs, ours in pairs_with_open_clip(rank, world_size)
    ]


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")
def test_clip_and_siglip_are_open_clips_process_by_process(pools: Pools) -> None:
    """Before DDP averages: the value, and the gradient that each process gets for the batch."""
    for of_rank in pools[3].run(beside_open_clip):
        for theirs, ours in of_rank:
            assert_same(ours, theirs)


# --- processes that disagree ------------------------------------------------------------------------------


GRADES = torch.eye(2).repeat(2, 1)  # of four lists of two
IDS = torch.arange(4)


def pairs_of(rank: int, rows: int = 4, dtype: torch.dtype = F32, **changed: Any) -> dict[str, Any]:
    """A rank's own inputs of a loss of pairs."""
    drawn = F.normalize(torch.randn(2, 4, D, generator=torch.Generator().manual_seed(rank)), dim=-1)
    v, t = drawn[:, :rows].to(dtype)
    return {"image_features": v, "text_features": t, "logit_scale": 10.0, **changed}


def lists_of(rank: int, **changed: Any) -> dict[str, Any]:
    """A rank's own inputs of a loss of lists: four of two candidates each."""
    pairs = pairs_of(rank)
    features = {"query_features": pairs["image_features"], "candidate_features": pairs["text_features"]}
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    return {**features, "grades": GRADES, "candidate_index": index, **changed}


def scaled_lists_of(rank: int, **changed: Any) -> dict[str, Any]:
    return lists_of(rank, logit_scale=1.0, **changed)


def with_bad_row(x: Tensor, value: float) -> Tensor:
    """The tensor with a value in its third row."""
    return x.index_fill(0, torch.tensor([2]), value)


class FailsBeyondRank0(nn.Module):
    """A loss that fails within its check by an error of another type than those of arguments."""

    def forward(self, image_features: Tensor, is_first: bool) -> None:
        with Gather().agreement(self, image_features=image_features):
            if not is_first:
                raise KeyError("a name")


@dataclass(frozen=True)
class Fault:
    """A loss whose inputs one of three processes has got wrong."""

    build: Callable[[], nn.Module]
    inputs_of: Callable[[int], dict[str, Any]]
    """The loss's arguments on a rank."""
    shown: tuple[str, ...]
    """Parts of the error of all processes."""


def fault_of_one_rank(
    build: Callable[[], nn.Module],
    *,
    shown: tuple[str, ...],
    valid_inputs_of: Callable[..., dict[str, Any]] = pairs_of,
    bad_rank: int = 1,
    **bad_inputs: Any,
) -> Fault:
    """One rank's call has bad inputs in place of its valid ones, and the error of all names that rank."""

    def inputs_of(rank: int) -> dict[str, Any]:
        return valid_inputs_of(rank, **(bad_inputs if rank == bad_rank else {}))

    return Fault(build, inputs_of, (*shown, f"rank {bad_rank}"))


def zero_row_of_teacher(rank: int) -> dict[str, Any]:
    teacher = with_bad_row(torch.eye(4), 0.0) if rank == 1 else torch.eye(4)
    return pairs_of(rank, **dict.fromkeys(TEACHER, teacher))


def mimicry_loss() -> nn.Module:
    return MimicryLoss()


def loss_of_in_modal_ranks() -> nn.Module:
    return RankConsistency(cross_modal=0.0)


def loss_with_ranks() -> nn.Module:
    return RankClipLoss(schedule="constant")


def lists_with_negatives() -> nn.Module:
    return RankedLists(in_batch_negatives=True)


def term_of_lists() -> nn.Module:
    return RankedListsTerm(lists_with_negatives())


FAULTS: dict[str, Fault] = {
    "teachers": Fault(
        loss_of_in_modal_ranks, lambda rank: pairs_of(rank, **{TEACHER[rank % 2]: torch.eye(4)}), TEACHER
    ),
    "a teacher": fault_of_one_rank(
        mimicry_loss, shown=(f"{TEACHER[1]} float32 [4, 6]",), **dict.fromkeys(TEACHER, torch.eye(4, D))
    ),
    "the number of pairs": Fault(
        RankConsistency,
        lambda rank: pairs_of(rank, rows=4 - rank),
        ("image_features float32 [4, 6]", "image_features float32 [3, 6]"),
    ),
    "dtypes": Fault(
        ClipLoss,
        lambda rank: pairs_of(rank, dtype=torch.float16 if rank else torch.bfloat16),
        ("text_features bfloat16 [4, 6]", "text_features float16 [4, 6]"),
    ),
    "gradients": Fault(
        ClipLoss,
        lambda rank: pairs_of(rank, image_features=torch.eye(4, D, requires_grad=rank != 1)),
        ("image_features float32 [4, 6] with a gradient", "rank 1"),
    ),
    "flags": Fault(
        lambda: ClipLoss(gather=Gather(gather_with_grad=dist.get_rank() == 0)),
        pairs_of,
        ("gather_with_grad=True", "gather_with_grad=False", "rank 1"),
    ),
    "ids": fault_of_one_rank(lambda: ClipLoss(same_id="share"), shown=("pair_ids int64 [4]",), pair_ids=IDS),
    "ids that are numbers": Fault(
        lambda: rank_clip(SigLipLoss(same_id="share"), None),
        lambda rank: pairs_of(rank, logit_bias=0.0, pair_ids=IDS.double() if rank == 1 else IDS),
        ("pair_ids", "torch.float64 [4]", "rank 1"),
    ),
    "ids that a base refuses": fault_of_one_rank(loss_with_ranks, shown=("pair_ids",), pair_ids=IDS),
    "an input of the base that is None": fault_of_one_rank(
        loss_with_ranks, shown=("pair_ids",), pair_ids=None
    ),
    "ids of queries": fault_of_one_rank(
        term_of_lists,
        shown=("query_ids int64 [4]",),
        valid_inputs_of=scaled_lists_of,
        query_ids=IDS,
    ),
    "a query on two processes": Fault(
        term_of_lists, lambda rank: scaled_lists_of(rank, query_ids=IDS + 3 * rank), ("3 and 4", "query")
    ),
    "queries on two processes": Fault(
        lists_with_negatives,
        lambda rank: lists_of(rank, query_features=lists_of(0)["query_features"]),
        ("query_features", "twice"),
    ),
    "a scale": fault_of_one_rank(ClipLoss, shown=("logit_scale", "0"), logit_scale=0.0),
    "a type": fault_of_one_rank(
        ClipLoss, shown=("TypeError", "text_features", "list"), bad_rank=2, text_features=[1.0]
    ),
    "a teacher's row of zeros": Fault(
        loss_with_ranks, zero_row_of_teacher, ("reference_image_features", "row 2", "rank 1")
    ),
    "a grade": fault_of_one_rank(
        lists_with_negatives,
        shown=("grades", "row 2", "nan"),
        valid_inputs_of=lists_of,
        grades=with_bad_row(GRADES, math.nan),
    ),
    "an index": fault_of_one_rank(
        lists_with_negatives,
        shown=("candidate_index", "row 3", "[4]"),
        valid_inputs_of=lists_of,
        bad_rank=2,
        candidate_index=torch.tensor([[0, 1], [0, 1], [0, 1], [2, 4]]),
    ),
    "an error of another kind": Fault(
        FailsBeyondRank0,
        lambda rank: {"image_features": torch.eye(2), "is_first": rank == 0},
        ("RuntimeError", "a name", "rank 1"),
    ),
}


def error_of(call: Callable[[], Any]) -> str:
    """The type and the message of its error, if there is one."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors_of_fault(rank: int, world_size: int, kind: str) -> tuple[str, str]:
    """The errors of a first and a second call of a new loss, as texts; empty where a call has none.

    The pool ends a rank that waits for another in vain.
    """
    loss, inputs = FAULTS[kind].build(), FAULTS[kind].inputs_of(rank)
    first = error_of(lambda: loss(**inputs))
    again = error_of(lambda: loss(**inputs))
    return first, again


@pytest.mark.parametrize("kind", FAULTS)
def test_an_error_of_one_process_is_the_error_of_all(pools: Pools, kind: str) -> None:
    """In a first call and again in a second one; the message has the parts that the fault says."""
    of_first_rank, *of_others = pools[3].run(errors_of_fault, kind)
    assert of_others == [of_first_rank] * 2
    first, again = of_first_rank
    assert first == again  # a refused call is not remembered as checked
    for part in FAULTS[kind].shown:
        assert part in first


class OnAccelerator(Tensor):
    """A tensor that says it is on an accelerator."""

    device = property(lambda _: torch.device("cuda", 1))  # type: ignore[assignment]


def five_checks(rank: int, world_size: int, tensor_type: type[Tensor]) -> tuple[list[Any], list[str]]:
    """The outcomes of five checks of a loss, and the devices by which they gathered texts.

    The outcome of a check that passes is the number of its collectives. An error's is "bad of rank 1" where
    this process was told of it by the others, "bad" where it raised its own alone.
    """
    devices: list[str] = []
    results: list[Any] = []
    gather_text = distributed._gather_text

    def by_way_of_the_cpu(text: str, device: torch.device, group: Any) -> list[str]:
        devices.append(str(device))
        return gather_text(text, torch.device("cpu"), group)

    loss = nn.Identity()  # the checks of one owner know what was agreed before
    is_bad_here = rank == 1
    batches = [  # rows, which are the batch's shape, and whether this process finds it bad
        (2, False),
        (2, False),
        (2, is_bad_here),
        (3, is_bad_here),
        (3, is_bad_here),
    ]
    with mock.patch.object(distributed, "_gather_text", by_way_of_the_cpu):
        for rows, is_bad in batches:
            features = torch.ones(rows, 2).as_subclass(tensor_type)
            try:
                with Collectives() as calls, Gather().agreement(loss, image_features=features):
                    if is_bad:
                        raise ValueError("bad")
                results.append(calls.counts.total())
            except ValueError as error:
                results.append("bad of rank 1" if "rank 1" in str(error) else "bad")
    return results, devices


def test_processes_on_cpus_ask_each_other_at_every_call(pools: Pools) -> None:
    """By one collective where no process has an error; on three errors texts are gathered, too."""
    asked, bad, devices = 1, "bad of rank 1", ["cpu"] * 3
    of_each_rank = ([asked, asked, bad, bad, bad], devices)
    assert pools[2].run(five_checks, Tensor) == [of_each_rank] * 2


def test_processes_on_accelerators_ask_each_other_where_a_batch_is_new(pools: Pools) -> None:
    """A batch of a shape that was good has no check, and an error is not remembered as agreed.

    To ask takes two collectives, which gather the lengths of texts, then the texts.
    """
    asked, not_asked, bad, devices = 2, 0, "bad of rank 1", ["cuda:1"] * 3
    of_rank_0, of_rank_1 = pools[2].run(five_checks, OnAccelerator)
    assert of_rank_0 == ([asked, not_asked, not_asked, bad, bad], devices)
    assert of_rank_1 == ([asked, not_asked, "bad", bad, bad], devices)


def test_text_goes_by_way_of_the_features_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes with the texts "abc" and "de", which are padded to one length."""
    lengths, characters = torch.tensor([3, 2]), torch.tensor([*b"abc", *b"de\0"])
    answers = iter([lengths, characters])
    devices: list[str] = []

    def gather(x: Tensor, group: Any) -> Tensor:
        """What both processes give: at the first call the lengths."""
        devices.append(x.device.type)
        return next(answers)

    monkeypatch.setattr(distributed, "_gather", gather)
    assert distributed._gather_text("abc", torch.device("meta"), None) == ["abc", "de"]
    assert devices == ["meta"] * 2


def errors_of_changing_batches(rank: int, world_size: int, name: str) -> list[str]:
    """The types of the errors, or "", of a loss's calls by six batches; in two of them the ranks differ."""
    if name == "ClipLoss":
        loss = ClipLoss()
    else:
        loss = torch.compile(catalog.load(name).constructor(), backend="eager")
    differing_rows, differing_dtype = 4 - rank, (F64, F32)[rank]
    batches = [(4, F64), (3, F64), (4, F32), (differing_rows, F64), (4, differing_dtype), (4, F64)]
    errors = []
    for rows, dtype in batches:
        v, t, captions = F.normalize(torch.randn(3, rows, D, dtype=dtype), dim=-1)
        inputs = {"image_features": v, "text_features": t, "logit_scale": 10.0}
        if name != "ClipLoss" and "caption_features" in input_names(name):
            inputs["caption_features"] = captions
        error = error_of(functools.partial(loss, **inputs))
        errors.append(error.partition(":")[0])
    return errors


@pytest.mark.parametrize("name", ["ClipLoss", *OF_PACKAGES])
def test_a_kind_of_batch_seen_before_is_compared_again(pools: Pools, name: str) -> None:
    """Also by compiled losses of other packages.

    Of six batches the fourth and the fifth differ between the processes, in their rows and in their dtype;
    the last is of the same kind as the first.
    """
    agreeing, differing = "", "ValueError"
    expected = [agreeing, agreeing, agreeing, differing, differing, agreeing]
    assert pools[2].run(errors_of_changing_batches, name) == [expected] * 2


# --- what else processes must not get wrong ----------------------------------------------------------------


def test_none_as_gather_is_the_default_gather() -> None:
    assert Gather.of(None) == Gather()


def test_one_process_is_rank_0_of_1() -> None:
    rank_and_size = (0, 1)
    assert Gather().place == rank_and_size
    assert Gather.of(False).place == rank_and_size


def test_without_a_group_a_place_is_the_given_rank_and_size() -> None:
    assert Gather(rank=1, world_size=4).place == (1, 4)


def test_one_process_gathers_its_own_tensor() -> None:
    v, t, *_ = whole_batch(world_size=1)
    images, texts = Gather()(v, t)
    assert images is v
    assert texts is t


@every_loss
@pytest.mark.parametrize(
    "rank_and_size", [{"rank": 1, "world_size": 4}, {"rank": 1}, {"world_size": 2}], ids=str
)
@pytest.mark.filterwarnings("ignore:logit_bias is given")  # to all losses alike
def test_a_place_among_processes_that_are_not_initialised_is_an_error_of_the_call(
    loss: str, rank_and_size: dict[str, int]
) -> None:
    built = LOSSES[loss].build(Gather(**rank_and_size))
    inputs = [x.detach() for x in whole_batch(1)]
    with pytest.raises(RuntimeError, match="init_process_group"):
        value_of(built, *inputs)


def test_constants_of_one_process_have_no_gradient() -> None:
    teacher = torch.ones(2, 3, requires_grad=True)
    constant, absent = Gather().constants(teacher, None)
    assert constant is not None
    assert not constant.requires_grad
    assert torch.equal(constant, teacher)
    assert absent is None


def test_a_rank_beyond_the_world_size_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be less than world_size; got rank=1, world_size=1"):
        Gather(rank=1, world_size=1)


def errors_of_wrong_places(rank: int, world_size: int) -> list[str]:
    """The errors of places that this process does not have in the default group, as texts."""
    v, t, s, _ = whole_batch(1)
    other_rank = (rank + 1) % world_size
    default_group = dist.group.WORLD
    attempts: list[Callable[[], Any]] = [
        lambda: RankConsistency(gather=Gather(rank=other_rank, world_size=world_size))(v, t, s),
        lambda: ClipLoss(gather=Gather(rank=rank, world_size=world_size + 1))(v, t, s),
        lambda: Gather(rank=0, world_size=1, group=default_group),
        lambda: Gather(rank=other_rank, world_size=world_size, group=default_group),
    ]
    return [error_of(attempt) for attempt in attempts]


def test_rank_and_world_size_that_are_not_the_groups_are_refused(pools: Pools) -> None:
    for rank, errors in enumerate(pools[2].run(errors_of_wrong_places)):
        assert len(errors) == 4
        for error in errors:
            assert re.search(f"ValueError: .*rank {rank} of 2.*rank=", error)


def errors_of_wrong_groups(rank: int, world_size: int) -> list[str]:
    """The errors for a group that is a text, and, but on the last rank, for one of the last rank alone."""
    (v, *_), last = whole_batch(1), world_size - 1
    group_of_last = dist.new_group([last])
    errors = [error_of(lambda: all_gather(v, "gloo"))]
    if rank != last:
        errors.append(error_of(lambda: Gather(group=group_of_last)))
        errors.append(error_of(lambda: all_gather(v, group_of_last)))
    return errors


def test_what_is_no_group_or_a_group_without_this_process_is_refused(pools: Pools) -> None:
    of_other, of_member = pools[2].run(errors_of_wrong_groups)
    assert len(of_member) == 1  # "gloo" is no group
    assert len(of_other) == 3  # and it is not in the group of the last rank
    for error in (*of_member, *of_other):
        assert error.startswith("ValueError: group ")


def numbers_that_show_a_nan(rank: int, world_size: int) -> dict[str, Tensor]:
    """By loss and flags, the number of this rank that must show a NaN in rank 0's images.

    It is the loss's value, but for SigLIP's, which sends no image: there it is the sum of the gradient by
    texts, and without gradients from other processes nothing shows it.
    """
    results = {}
    for (flags, gather), (name, case) in itertools.product(FLAGS.items(), LOSSES.items()):
        refuses_nan = name.startswith("MimicryLoss")  # in its teacher, which is made of the features
        if refuses_nan or (is_siglip(name) and not gather.gather_with_grad):
            continue
        images, *_ = inputs = whole_batch(world_size=1)
        if rank == 0:
            images.data[0, 0] = math.nan
        value, _, by_texts, *_ = value_and_gradients(value_of(case.build(gather), *inputs), inputs)
        results[f"{name} {flags}"] = by_texts.sum() if is_siglip(name) else value
    return results


def test_nan_of_one_rank_is_seen_by_all(pools: Pools) -> None:
    for of_rank in pools[2].run(numbers_that_show_a_nan):
        assert len(of_rank) > len(LOSSES)  # nearly all losses, under several flags
        assert [name for name, number in of_rank.items() if not number.isnan()] == []


def value_where_infinite_rows_are_ignored(rank: int, world_size: int, budget: int | None) -> Tensor:
    """CLIP's loss of pairs that all have one id, of which rank 0 has images of −∞."""
    v, t, s, _ = whole_batch(1)
    v = torch.full_like(v, -math.inf) if rank == 0 else v.detach()
    ids = torch.zeros(N, dtype=torch.int64)
    return ClipLoss(same_id="ignore", memory_budget=budget)(v, t.abs(), s, pair_ids=ids)


@pytest.mark.parametrize("budget", [None, 0], ids=["whole matrices", "streamed"])
def test_infinity_of_one_rank_is_seen_by_one_whose_rows_ignore_it(pools: Pools, budget: int | None) -> None:
    assert all(value.isnan() for value in pools[2].run(value_where_infinite_rows_are_ignored, budget))


def logged_messages(rank: int, world_size: int) -> list[str]:
    """The lines that rankloss logs while a loss is built and trained."""
    v, t, s, _ = whole_batch(1)
    with TestCase().assertLogs("rankloss", logging.INFO) as caught:
        logging.getLogger("rankloss").info("assertLogs needs one")
        for gather in FLAGS.values():
            loss = RankConsistency(gather=gather)
            for _ in range(2):
                loss(v, t, s)
        RankClipLoss().set_epoch(epoch=1, epochs=1)
    return [record.getMessage() for record in caught.records[1:]]


def test_the_first_process_alone_logs_and_once(pools: Pools) -> None:
    """Under one of four flags, of two calls a loss whose gradients differ; and a schedule of one epoch."""
    of_first, *of_others = pools[3].run(logged_messages)
    first_words = [re.split("[: ]", message)[0] for message in of_first]
    assert first_words == ["local_loss", "epochs=1"]
    assert of_others == [[], []]
