"""Real gloo processes against one process: what the losses make of a batch that is spread over ranks."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
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

Values = list[Tensor]  # a value, then its gradients by images, texts, scale and bias


# --- the losses, and what they owe ------------------------------------------------------------------------


def ids_of(images: Tensor) -> Tensor:
    """Of a few values, the same wherever an image is."""
    return 2 * (images[:, 0] > 0) - 3 * (images[:, 1] > 0)


def clip_of(view: one_process.View, bias: Tensor, **options: Any) -> Tensor:
    return one_process.clip(view, **options) + 0 * bias


def with_ids(oracle: Callable[..., Tensor], same_id: str) -> Callable[..., Tensor]:
    return lambda view, bias: oracle(view, bias, ids=ids_of(view.image), same_id=same_id)


def rank_clip(base: Callable[..., nn.Module] = ClipLoss, **options: Any) -> nn.Module:
    return RankClipLoss(base(**options), schedule="constant", normalizer=1.0, **options)


class Given(nn.Module):
    """A loss with inputs that are made of its features."""

    def __init__(
        self, of: Callable[..., dict[str, Tensor]], make: Callable[..., nn.Module], **options: Any
    ) -> None:
        super().__init__()
        self.of, self.loss = of, make(**options)

    def forward(self, v: Tensor, t: Tensor, *inputs: Tensor, **more: Tensor) -> Any:
        return self.loss(v, t, *inputs, **more, **self.of(v, t))


def pair_ids(v: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {"pair_ids": ids_of(v)}


def taught(v: Tensor, t: Tensor) -> dict[str, Tensor]:
    """A teacher whose features are the student's, reversed."""
    return dict(zip(TEACHER, (x.detach().flip(-1) for x in (v, t)), strict=True))


def mimicry_terms(view: one_process.View) -> Tensor:
    rows = slice(view.first, view.first + len(view.image_anchors))
    students, teachers = (view.image_anchors, view.text_anchors), taught(view.image, view.text).values()
    distances = ((x - y[rows]).square().sum(-1).mean() for x, y in zip(students, teachers, strict=True))
    return 8 * sum(distances)


class OwnRows(GatheringLoss):
    """CLIP's loss as a loss of rows."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        inputs = image_features, text_features, logit_scale, logit_bias
        return self.streamed(lambda x, row: x.logsumexp(-1) - x.diagonal(row), *inputs, chunk_size=3)


Rank = functools.partial(RankConsistency, chunk_size=3)
LOSSES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "clip": (ClipLoss, clip_of),
    "clip, streamed": (functools.partial(ClipLoss, memory_budget=0), clip_of),
    "clip, smoothed": (
        functools.partial(ClipLoss, label_smoothing=0.2, memory_budget=0),
        functools.partial(clip_of, label_smoothing=0.2),
    ),
    "own rows": (OwnRows, clip_of),
    "siglip": (SigLipLoss, one_process.siglip),
    "siglip, streamed": (functools.partial(SigLipLoss, memory_budget=0), one_process.siglip),
    "cross": (functools.partial(Rank, in_modal=0), lambda view, bias: one_process.cross(view)),
    "in": (functools.partial(Rank, cross_modal=0), lambda view, bias: one_process.in_(view)),
    "rank_clip": (rank_clip, lambda view, bias: one_process.rank_clip(view)),
    "rank_clip over siglip": (
        functools.partial(rank_clip, SigLipLoss),
        lambda view, bias: one_process.siglip(view, bias) + one_process.rank_terms(view),
    ),
    "mimicry": (
        functools.partial(Given, taught, MimicryLoss),
        lambda view, bias: one_process.clip(view) + mimicry_terms(view),
    ),
}


def spread_of_clip(view: one_process.View, bias: Tensor) -> Tensor:
    return one_process.clip(view) + 0.3 * one_process.spread(view)


class OfMoreDimensions(nn.Module):
    """A loss of the same similarities in three times the dimensions, more than there are pairs."""

    def __init__(self, make: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.loss = make(**options)

    def forward(self, v: Tensor, t: Tensor, *inputs: Tensor, **more: Tensor) -> Any:
        return self.loss(*(x.repeat(1, 3) / math.sqrt(3) for x in (v, t)), *inputs, **more)


LOSSES["spread"] = SpreadLoss, spread_of_clip
LOSSES["spread of more dimensions"] = functools.partial(OfMoreDimensions, SpreadLoss), spread_of_clip
LOSSES["spread over siglip"] = (
    lambda gather=None: SpreadLoss(SigLipLoss(gather=gather), gather=gather),
    lambda view, bias: one_process.siglip(view, bias) + 0.3 * one_process.spread(view),
)
for same_id, budget in itertools.product(("ignore", "share"), (None, 0)):
    for of_pairs in ("clip", "clip, smoothed", "siglip"):
        make, oracle = LOSSES[of_pairs]
        make = functools.partial(Given, pair_ids, make, same_id=same_id, memory_budget=budget)
        name = f"{of_pairs} of ids, {same_id}{', streamed' if budget == 0 else ''}"
        LOSSES[name] = make, with_ids(oracle, same_id)
LOSSES["rank_clip over clip of ids"] = (
    functools.partial(
        Given, pair_ids, functools.partial(rank_clip, functools.partial(ClipLoss, same_id="ignore"))
    ),
    lambda view, bias: with_ids(clip_of, "ignore")(view, bias) + one_process.rank_terms(view),
)
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
LAYOUTS = [*FLAGS, "default", "group", "inference mode"]


def of_flags(flags: tuple[bool, bool]) -> Gather:
    return Gather(local_loss=flags[0], gather_with_grad=flags[1])


def leaves(world_size: int, dtype: torch.dtype = torch.float64, **batch: Any) -> tuple[Tensor, ...]:
    """Features of the whole batch, scale and bias."""
    given = random_batch(batch.pop("seed", 0), N * world_size, D, SCALE, **batch)
    return (*given.leaves(dtype), torch.tensor(-2.0, dtype=dtype, requires_grad=True))


def own(rank: int, world_size: int, *whole: Tensor) -> Values:
    """This rank's share of each."""
    return [x.chunk(world_size)[rank] for x in whole]


def called(loss: nn.Module, v: Tensor, t: Tensor, s: Tensor, b: Tensor, **more: Any) -> Tensor:
    takes_bias = not isinstance(loss, RankConsistency)
    return loss(v, t, s, **({"logit_bias": b} if takes_bias else {}), **more)


def differentiated(value: Tensor, inputs: tuple[Tensor, ...]) -> Values:
    found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return [value.detach(), *found]


def averaged(results: list[Values]) -> Values:
    """DDP's mean of the ranks' values."""
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


def expected_of(
    loss: str, inputs: tuple[Tensor, ...], world_size: int, flags: tuple[bool, bool] = (True, True)
) -> Values:
    *features, bias = inputs
    oracle = functools.partial(LOSSES[loss][1], bias=bias)
    return differentiated(one_process.mean_loss(oracle, tuple(features), world_size, *flags), inputs)


# --- the table --------------------------------------------------------------------------------------------


def parity_group(rank: int, world_size: int) -> Any:
    """This process's group, the even or the odd ranks: its ranks are not the default group's."""
    groups = [dist.new_group(list(range(parity, world_size, 2))) for parity in range(min(2, world_size))]
    return groups[rank % 2]


def of_this_rank(rank: int, world_size: int) -> dict[Any, Values]:
    """Every loss under every layout: what this rank, with its share of the batch, makes of it."""
    group = parity_group(rank, world_size)
    found = {}
    for loss, layout in itertools.product(LOSSES, LAYOUTS):
        place, inputs, gather = (rank, world_size), leaves(world_size), None
        if layout == "group":
            place = dist.get_rank(group), dist.get_world_size(group)
            inputs, gather = leaves(place[1], seed=rank % 2), Gather(group=group)
        elif layout in FLAGS:
            gather = of_flags(layout)
        arguments = LOSSES[loss][0](gather=gather), *own(*place, *inputs[:2]), *inputs[2:]
        if layout == "inference mode":
            with torch.inference_mode():
                found[loss, layout] = [called(*arguments)]
        else:
            found[loss, layout] = differentiated(called(*arguments), inputs)
    return found


def test_every_loss_of_pairs_is_in_the_table() -> None:
    """Whoever adds one to the subjects of the other tests is told to add it here."""
    built = {type(part).__name__ for make, _ in LOSSES.values() for part in make(gather=False).modules()}
    assert {subject.covers for subject in SUBJECTS if subject.takes_pairs} - {""} <= built


@pytest.fixture(scope="module", params=[1, 2, 3])
def table(request: pytest.FixtureRequest, pools: Pools) -> list[dict[Any, Values]]:
    """By rank, for each number of processes."""
    return pools[request.param].run(of_this_rank)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("flags", [*FLAGS, "default"])
def test_value_and_gradients_follow_the_flags_rules(table: list[Any], loss: str, flags: Any) -> None:
    w = len(table)
    actual = averaged([of_rank[loss, flags] for of_rank in table])
    local_loss, gather_with_grad = (True, True) if flags == "default" else flags
    assert_same(actual, expected_of(loss, leaves(w), w, (local_loss, gather_with_grad)))
    whole = expected_of(loss, leaves(w), 1)
    assert_same([actual[0], *actual[3:]], [whole[0], *whole[3:]])  # the scale's gradient is always exact
    if gather_with_grad:
        assert_same(actual, whole)
    elif not local_loss and "siglip" not in loss:  # of all terms alike: the launch changes no balance
        assert_same(actual[1:3], [x / w for x in whole[1:3]])


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_take_a_group_and_look_no_further_and_need_no_graph(table: list[Any], loss: str) -> None:
    for parity, of_group in enumerate((table[::2], table[1::2])):
        if of_group:
            actual = averaged([of_rank[loss, "group"] for of_rank in of_group])
            assert_same(actual, expected_of(loss, leaves(len(of_group), seed=parity), 1))
    (value,) = averaged([of_rank[loss, "inference mode"] for of_rank in table])
    assert_same([value], expected_of(loss, leaves(len(table)), 1)[:1])


SHARDED: dict[str, dict[str, Any]] = {
    **{str(x): x for x in [{}, *CHANGES]},
    "teacher": {"teacher": TEACHER},
    "teacher of texts": {"teacher": TEACHER[1:], "cross_modal": 0.0},
    "one pair": {"pairs": 1},
    "float32": {"dtype": torch.float32},
}


def of_options(rank: int, world_size: int) -> dict[str, tuple[Values, Values]]:
    """This rank's values of its share, beside those of one process that has the whole batch."""
    found = {}
    for name, options in SHARDED.items():
        options = dict(options)
        pairs, dtype = options.pop("pairs", N), options.pop("dtype", torch.float64)
        inputs = leaves(world_size, dtype, duplicates=2)
        inputs = (*(x[: pairs * world_size] for x in inputs[:2]), *inputs[2:])
        wide = random_batch(1, pairs * world_size, 9, 1.0, duplicates=1)
        teacher = dict(zip(TEACHER, (wide.image, wide.text), strict=True))
        named = options.pop("teacher", TEACHER if "reference_scale" in options else ())
        teacher = {k: teacher[k] for k in named}
        results = []
        for gather in (None, False):
            place = (0, 1) if gather is False else (rank, world_size)
            of_teacher = {k: own(*place, x)[0] for k, x in teacher.items()}
            loss = Rank(**{"gather": gather, **options})
            with Collectives() as calls:
                value = called(loss, *own(*place, *inputs[:2]), *inputs[2:], **of_teacher)
            assert bool(calls.counts) == (gather is None)
            if value.dim():  # of each anchor of this process
                weights = own(*place, torch.arange(1.0, 1 + pairs * world_size))[0]
                value = place[1] * (weights * value).sum()
            results.append(differentiated(value, inputs))
        found[name] = tuple(results)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def of_all_options(request: pytest.FixtureRequest, pools: Pools) -> list[dict[str, Any]]:
    return pools[request.param].run(of_options)


@pytest.mark.parametrize("name", SHARDED)
def test_every_option_shards_exactly(of_all_options: list[dict[str, Any]], name: str) -> None:
    actual = averaged([of_rank[name][0] for of_rank in of_all_options])
    assert_same(actual, of_all_options[0][name][1], 1e-5 if name == "float32" else 1e-10)


# --- under DistributedDataParallel ------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(5, D, bias=False, dtype=torch.float64) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.logit_scale.exp()


def train(rank: int, world_size: int, gather: Gather | None) -> tuple[Values, dict[str, int]]:
    """A few steps of SGD with the ranking loss: the weights at the end, and the last step's collectives."""
    model = Towers()
    towers = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = RankClipLoss(normalizer=1.0, gather=gather)
    for step in range(1, 4):
        criterion.set_progress(step, 3)
        optimizer.zero_grad()
        data = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        with Collectives() as calls:
            criterion(*towers(*own(rank, world_size, *data))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], dict(calls.counts)


@pytest.mark.parametrize("gather", [None, Gather(local_loss=False)], ids=["default", "global loss"])
def test_training_ends_at_the_single_process_weights(pools: Pools, gather: Gather | None) -> None:
    expected, _ = train(0, 1, None)
    for weights, calls in pools[3].run(train, gather):
        assert_same(weights, expected)
        # One of the loss's checks, two of its backward pass; all parameters fit one of DDP's buckets.
        assert (calls["allgather"], calls["allreduce"]) == (2, 4)
    assert all((x - y).norm() > 1e-3 * y.norm() for x, y in zip(expected, Towers().parameters(), strict=True))


# --- the collectives --------------------------------------------------------------------------------------


def gatherings(rank: int, world_size: int) -> dict[str, Any]:
    x = torch.tensor([[1.0 + rank], [0.5]], dtype=torch.float64, requires_grad=True)
    y = all_gather(x)
    # Every rank weighs the whole by another factor: the gradient has to add them up.
    weights = (rank + 1) * torch.arange(1, len(y) + 1.0)[:, None]
    first, of_whole = torch.autograd.grad((weights * y).sum(), (x, y))
    (once,) = torch.autograd.grad((rank + 1) * all_gather(x).pow(3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.pow(2).sum(), x)
    half = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    one_is_large = torch.where(torch.arange(2 * world_size) % world_size == rank, 256.0, 1.0).bfloat16()
    (of_half,) = torch.autograd.grad((all_gather(half) * one_is_large).sum(), half)
    group = parity_group(rank, world_size)
    of_group = all_gather(x[:1], group)
    is_own = all_gather(x, group) is x
    found = {"y": y, "first": first, "twice": twice, "half": of_half, "group": of_group, "is_own": is_own}
    return {**found, "of_whole": torch.equal(of_whole, weights)}


@pytest.fixture(scope="module", params=[1, 2, 3])
def gathered(request: pytest.FixtureRequest, pools: Pools) -> list[dict[str, Any]]:
    """What each of some processes has gathered."""
    return pools[request.param].run(gatherings)


def test_all_gather_concatenates(gathered: list[dict[str, Any]]) -> None:
    for found in gathered:
        assert found["y"].flatten().tolist() == [x for r in range(len(gathered)) for x in (1.0 + r, 0.5)]


def test_first_and_second_derivatives_of_all_gather_add_up(gathered: list[dict[str, Any]]) -> None:
    total = sum(range(1, len(gathered) + 1))
    for rank, found in enumerate(gathered):
        assert found["of_whole"]  # the reduction leaves the gradient of the whole as it was
        assert found["first"].flatten().tolist() == [total * (2.0 * rank + 1), total * (2.0 * rank + 2)]
        # Σ_w L_w = total·Σ x³; the square of its gradient is 9·total²·x⁴.
        second = [36 * total**2 * x**3 for x in (1.0 + rank, 0.5)]
        assert found["twice"].flatten().tolist() == pytest.approx(second)


def test_gradients_of_half_precision_are_added_in_float32(gathered: list[dict[str, Any]]) -> None:
    for found in gathered:
        # 256 + 1 is 256 in bfloat16; the sum of three is taken in float32.
        assert found["half"].dtype == torch.bfloat16
        assert len(gathered) != 3 or found["half"].tolist() == [258.0] * 2


def test_all_gather_of_a_group_is_of_its_members_alone(gathered: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(gathered):
        members = range(rank % 2, len(gathered), 2)
        assert found["group"].flatten().tolist() == [1.0 + r for r in members]
        assert found["is_own"] == (len(members) == 1)


def counted(rank: int, world_size: int, one_tensor: bool = False) -> dict[Any, Any]:
    """A second step: its values, the collectives forward and backward, and the bytes that they fill."""
    found: dict[Any, Any] = {}
    has_it = mock.patch.object(distributed, "_has_tensor_collectives", return_value=True)
    with has_it if one_tensor else nullcontext():
        for flags, (name, (make, _)) in itertools.product(FLAGS, LOSSES.items()):
            inputs, loss = leaves(world_size), make(gather=of_flags(flags))
            mine = own(rank, world_size, *inputs[:2])
            called(loss, *mine, *inputs[2:])  # the first compares what the processes bring
            with Collectives() as forward:
                value = called(loss, *mine, *inputs[2:])
            with Collectives() as backward:
                values = differentiated(value, inputs)
            found[flags, name] = values, dict(forward.counts), forward.filled.total(), dict(backward.counts)
    return found


@pytest.fixture(scope="module")
def plain(pools: Pools) -> list[dict[Any, Any]]:
    return pools[2].run(counted)


@dataclass(frozen=True)
class Step:
    """The collectives of a process's step: calls forward and backward, and the bytes that the former fill."""

    name: str
    local_loss: bool
    gather_with_grad: bool
    forward: dict[str, int]
    filled: int
    backward: dict[str, int]


@pytest.fixture(scope="module")
def steps(plain: list[dict[Any, Any]]) -> list[Step]:
    """Of every loss under all flags, by both processes."""
    return [Step(name, *flags, *calls) for found in plain for (flags, name), (_, *calls) in found.items()]


BY_COVARIANCE = ("spread", "spread over siglip")  # of which sums are reduced, and no features gathered
OF_MORE = ("rank_clip over siglip", "mimicry", "spread of more dimensions")  # than one gathering of D columns


@pytest.fixture(scope="module")
def of_one_gathering(steps: list[Step]) -> list[Step]:
    """Steps that have no other messages than the features', the ids' and the checks'."""
    return [step for step in steps if step.name not in (*BY_COVARIANCE, *OF_MORE)]


def checks_of(name: str) -> int:
    """The losses of a composition that are called: RankCLIP's pass computes its own base."""
    parts = [part for part in LOSSES[name][0](gather=False).modules() if isinstance(part, GatheringLoss)]
    return len(parts) - (name == "rank_clip")


def modalities_of(step: Step) -> int:
    """Two; SigLIP's loss of this process's images needs the texts alone."""
    return 1 if step.name.startswith("siglip") and step.local_loss else 2


def test_every_loss_that_is_called_compares_its_inputs_once(steps: list[Step]) -> None:
    for step in steps:
        if step.name not in BY_COVARIANCE:
            assert step.forward["allreduce"] == checks_of(step.name), step


def test_a_step_gathers_each_modality_once(of_one_gathering: list[Step]) -> None:
    """And ids, where there are some."""
    for step in of_one_gathering:
        assert step.forward["allgather"] == modalities_of(step) + (" ids" in step.name), step


def test_a_step_fills_the_bytes_of_features_ids_and_checks_alone(of_one_gathering: list[Step]) -> None:
    for step in of_one_gathering:
        of_features = modalities_of(step) * 2 * N * D * 8
        of_ids = 2 * N * 8 if " ids" in step.name else 0
        assert step.filled == of_features + of_ids + 24 * checks_of(step.name), step


def test_the_gradient_of_each_gathered_modality_is_reduced_once(of_one_gathering: list[Step]) -> None:
    for step in of_one_gathering:
        assert step.backward == ({"allreduce": modalities_of(step)} if step.gather_with_grad else {}), step


def test_mimicry_gathers_distances_where_all_rows_are_computed(steps: list[Step]) -> None:
    """Beside the two modalities that its base gathers."""
    for step in (step for step in steps if step.name == "mimicry"):
        assert step.forward["allgather"] == (2 if step.local_loss else 3)


def test_a_spread_of_more_dimensions_than_pairs_has_the_features_of_its_base(steps: list[Step]) -> None:
    for step in (step for step in steps if step.name == "spread of more dimensions"):
        assert step.forward["allgather"] == 2


def test_the_spread_sums_means_and_covariances_and_gathers_deviations_of_all_rows(steps: list[Step]) -> None:
    """Beside the two modalities that its base gathers."""
    for step in (step for step in steps if step.name == "spread"):
        deviations = 0 if step.local_loss else 2
        assert step.forward["allgather"] == 2 + deviations
        assert step.forward["allreduce"] == 4 + checks_of("spread")


def test_sums_of_the_spread_are_reduced_backward_unless_other_items_are_constants(steps: list[Step]) -> None:
    for step in (step for step in steps if step.name == "spread"):
        deviations = 0 if step.local_loss else 2
        are_constants = step.local_loss and not step.gather_with_grad
        of_sums = 0 if are_constants else 4
        of_features = 2 + deviations if step.gather_with_grad else 0
        assert step.backward.get("allreduce", 0) == of_sums + of_features


@pytest.mark.skipif(
    not hasattr(dist, "all_gather_single"), reason="this gloo does not reduce into one tensor"
)
def test_collectives_of_one_tensor_give_the_same(plain: list[dict[Any, Any]], pools: Pools) -> None:
    for expected, of_rank in zip(plain, pools[2].run(counted, True), strict=True):
        for (flags, name), (values, _, filled, backward) in of_rank.items():
            assert_same(values, expected[flags, name][0], 1e-14)
            if name in ("clip", "rank_clip"):
                assert filled == 2 * 2 * N * D * 8 + 24
                assert all("reduce_scatter" in call for call in backward)
                assert sum(backward.values()) == (2 if flags[1] else 0)


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
    monkeypatch.setattr(dist, "get_backend", lambda _: backend)
    features = SimpleNamespace(is_cpu=device == "cpu")
    assert distributed._has_tensor_collectives(features, None) is expected


def shared_and_separate(rank: int, world_size: int) -> list[tuple[int, dict[str, int], Values, Values]]:
    """By epoch: two losses of what is gathered once, beside the same of what each has gathered for itself."""
    inputs = v, t, s, _ = leaves(world_size)
    mine = own(rank, world_size, v, t)
    found = []
    for flags, epoch in itertools.product(FLAGS, (1, 2)):  # λ is 0, and the base alone is computed; then 1
        gather = of_flags(flags)
        losses = RankClipLoss(schedule="linear", gather=gather), RankConsistency(gather=gather)
        losses[0].set_epoch(epoch, epochs=2)
        separate = sum(loss(*mine, s) for loss in losses)
        with Collectives() as calls, gather_once():
            shared = sum(loss(*mine, s) for loss in losses)
        values = [differentiated(x, inputs) for x in (shared, separate)]
        found.append((epoch, dict(calls.counts), *values))
    return found


def test_one_gathering_serves_several_losses(pools: Pools) -> None:
    for of_rank in pools[2].run(shared_and_separate):
        for epoch, counts, shared, separate in of_rank:
            # Each loss that is called checks its inputs once. The base of RankClipLoss is called, as a third,
            # where λ is 0. Where λ is 1, it is computed with the rank terms.
            checks = {1: 3, 2: 2}[epoch]
            assert counts == {"allgather": 2, "allreduce": checks}  # images and texts, each gathered once
            assert_same(shared, separate, 1e-14)


def compiled(rank: int, world_size: int) -> list[tuple[Values, Values]]:
    inputs = leaves(world_size)
    mine = own(rank, world_size, *inputs[:2])
    found = []
    for name, backend in (("siglip, streamed", "eager"), ("rank_clip", "aot_eager")):
        eager = LOSSES[name][0]()
        torch._dynamo.reset()
        losses = eager, torch.compile(eager, backend=backend)  # with graph breaks around the collectives
        found.append(tuple(differentiated(f(*mine, *inputs[2:]), inputs) for f in losses))
    return found


def test_compiled_loss_gathers_as_the_eager_one(pools: Pools) -> None:
    for of_rank in pools[2].run(compiled):
        for eager, through_dynamo in of_rank:
            assert_same(through_dynamo, eager)


# --- open_clip's losses -----------------------------------------------------------------------------------


def beside_open_clip(rank: int, world_size: int) -> dict[str, list[Values]]:
    from open_clip import loss as open_clip

    place = {"rank": rank, "world_size": world_size}
    pairs = {}
    for flags in (dict(zip(("local_loss", "gather_with_grad"), x, strict=True)) for x in FLAGS):
        ours = ClipLoss(gather=Gather(**place, **flags))
        pairs[f"clip {flags}"] = open_clip.ClipLoss(**place, **flags), ours
    for how, budget in itertools.product(("bidir", "shift", "reduce", "gather"), (0, None)):
        ours = SigLipLoss(gather=Gather(**place), memory_budget=budget)
        pairs[f"siglip {how} {budget}"] = open_clip.SigLipLoss(**place, dist_impl=how), ours
    inputs = leaves(world_size)
    given = *own(rank, world_size, *inputs[:2]), *inputs[2:]
    return {name: [differentiated(called(x, *given), inputs) for x in both] for name, both in pairs.items()}


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")
def test_clip_and_siglip_are_open_clips_process_by_process(pools: Pools) -> None:
    """Before DDP averages: the value, and the gradient that each process gets for the batch."""
    for of_rank in pools[3].run(beside_open_clip):
        for theirs, ours in of_rank.values():
            assert_same(ours, theirs)


# --- processes that disagree ------------------------------------------------------------------------------


GRADES = torch.eye(2).repeat(2, 1)


def pairs_of(rank: int, rows: int = 4, dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    drawn = F.normalize(torch.randn(2, 4, D, generator=torch.Generator().manual_seed(rank)), dim=-1)
    v, t = drawn[:, :rows].to(dtype)
    return {"image_features": v, "text_features": t, "logit_scale": 10.0, **changed}


def lists_of(rank: int, **changed: Any) -> dict[str, Any]:
    pairs = pairs_of(rank)
    features = {"query_features": pairs["image_features"], "candidate_features": pairs["text_features"]}
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    return {**features, "grades": GRADES, "candidate_index": index, **changed}


def without(x: Tensor, value: float, rank: int) -> Tensor:
    """The tensor, on rank 1 with a value in its third row."""
    return x.index_fill(0, torch.tensor([2]), value) if rank == 1 else x


class FailsElsewhere(nn.Module):
    """A check with an error that is of no argument."""

    def forward(self, image_features: Tensor, is_first: bool) -> None:
        with Gather().agreement(self, image_features=image_features):
            if not is_first:
                raise KeyError("a name")


Fault = tuple[Callable[..., nn.Module], Callable[[int], dict[str, Any]], tuple[str, ...]]


def fault(
    loss: Callable[..., nn.Module], *named: str, bad: int = 1, of: Any = pairs_of, **changed: Any
) -> Fault:
    """The loss, the inputs by rank, of which one has some instead, and what the error of all ranks names."""
    return loss, lambda rank: of(rank, **(changed if rank == bad else {})), (*named, f"rank {bad}")


Rows = functools.partial(RankConsistency, cross_modal=0.0)
Lists = functools.partial(RankedLists, in_batch_negatives=True)
Constant = functools.partial(RankClipLoss, schedule="constant")
OfIds = functools.partial(ClipLoss, same_id="share")
OverIds = functools.partial(rank_clip, functools.partial(SigLipLoss, same_id="share"))
IDS = torch.arange(4)
scaled_lists = functools.partial(lists_of, logit_scale=1.0)
FAULTS: dict[str, Fault] = {
    "teachers": (Rows, lambda rank: pairs_of(rank, **{TEACHER[rank % 2]: torch.eye(4)}), TEACHER),
    "a teacher": fault(
        MimicryLoss, f"{TEACHER[1]} float32 [4, 6]", **dict.fromkeys(TEACHER, torch.eye(4, D))
    ),
    "the number of pairs": (
        RankConsistency,
        lambda rank: pairs_of(rank, rows=4 - rank),
        ("image_features float32 [4, 6]", "image_features float32 [3, 6]"),
    ),
    "dtypes": (
        ClipLoss,
        lambda rank: pairs_of(rank, dtype=torch.float16 if rank else torch.bfloat16),
        ("text_features bfloat16 [4, 6]", "text_features float16 [4, 6]"),
    ),
    "gradients": (
        ClipLoss,
        lambda rank: pairs_of(rank, image_features=torch.eye(4, D, requires_grad=rank != 1)),
        ("image_features float32 [4, 6] with a gradient", "rank 1"),
    ),
    "flags": (
        lambda: ClipLoss(gather=Gather(gather_with_grad=dist.get_rank() == 0)),
        pairs_of,
        ("gather_with_grad=True", "gather_with_grad=False", "rank 1"),
    ),
    "ids": fault(OfIds, "pair_ids int64 [4]", pair_ids=IDS),
    "ids that are numbers": (
        OverIds,
        lambda rank: pairs_of(rank, logit_bias=0.0, pair_ids=IDS.double() if rank == 1 else IDS),
        ("pair_ids", "torch.float64 [4]", "rank 1"),
    ),
    "ids that a base refuses": fault(Constant, "pair_ids", pair_ids=IDS),
    "an input of the base that is None": fault(Constant, "pair_ids", pair_ids=None),
    "ids of queries": fault(
        lambda: RankedListsTerm(Lists()), "query_ids int64 [4]", of=scaled_lists, query_ids=IDS
    ),
    "a query on two processes": (
        lambda: RankedListsTerm(Lists()),
        lambda rank: scaled_lists(rank, query_ids=IDS + 3 * rank),
        ("3 and 4", "query"),
    ),
    "queries on two processes": (
        Lists,
        lambda rank: lists_of(rank, query_features=lists_of(0)["query_features"]),
        ("query_features", "twice"),
    ),
    "a scale": fault(ClipLoss, "logit_scale", "0", logit_scale=0.0),
    "a type": fault(ClipLoss, "TypeError", "text_features", "list", bad=2, text_features=[1.0]),
    "a teacher's row of zeros": (
        rank_clip,
        lambda rank: pairs_of(rank, **{name: without(torch.eye(4), 0.0, rank) for name in TEACHER}),
        ("reference_image_features", "row 2", "rank 1"),
    ),
    "a grade": fault(Lists, "grades", "row 2", "nan", of=lists_of, grades=without(GRADES, math.nan, 1)),
    "an index": fault(
        Lists,
        *("candidate_index", "row 3", "[4]"),
        bad=2,
        of=lists_of,
        candidate_index=torch.tensor([[0, 1]] * 3 + [[2, 4]]),
    ),
    "an error of another kind": (
        FailsElsewhere,
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


def faulty(rank: int, world_size: int, kind: str) -> list[str]:
    """The error of a loss that meets the others for the first time, and what the same batch gives again."""
    loss, inputs = FAULTS[kind][0](), FAULTS[kind][1](rank)
    return [error_of(lambda: loss(**inputs)) for _ in range(2)]  # a wait without end is ended by the pool


@pytest.mark.parametrize("kind", FAULTS)
def test_an_error_of_one_process_is_the_error_of_all(pools: Pools, kind: str) -> None:
    results = pools[3].run(faulty, kind)
    assert all(messages == results[0] for messages in results)
    first, again = results[0]
    assert first == again  # nothing was taken as agreed
    for part in FAULTS[kind][2]:
        assert part in first


class Elsewhere(Tensor):
    """A tensor that says it is on an accelerator."""

    device = property(lambda _: torch.device("cuda", 1))  # type: ignore[assignment]


def on_device(rank: int, world_size: int, kind: type[Tensor]) -> list[Any]:
    """Five checks of a loss: good, good, bad on rank 1; then twice bad ones of a new batch."""
    by_device, found = [], []
    gather_text = distributed._gather_text

    def on_cpu(text: str, device: torch.device, group: Any) -> list[str]:
        by_device.append(str(device))
        return gather_text(text, torch.device("cpu"), group)

    owner = nn.Identity()
    with mock.patch.object(distributed, "_gather_text", on_cpu):
        for rows, is_bad in ((2, False), (2, False), (2, rank == 1), (3, rank == 1), (3, rank == 1)):
            x = torch.ones(rows, 2).as_subclass(kind)
            try:
                with Collectives() as calls, Gather().agreement(owner, image_features=x):
                    if is_bad:
                        raise ValueError("bad")
                found.append(calls.counts.total())
            except ValueError as error:
                found.append("bad of rank 1" if "rank 1" in str(error) else "bad")
    return [*found, by_device]


def test_a_cpu_asks_others_at_each_call_and_an_accelerator_where_a_batch_is_new(pools: Pools) -> None:
    bad, devices = "bad of rank 1", ["cuda:1"] * 3  # an error is not remembered as agreed
    assert pools[2].run(on_device, Tensor) == [[1, 1, bad, bad, bad, ["cpu"] * 3]] * 2
    later = [0, "bad"]  # of each rank, where nobody asks
    expected = [[2, 0, later[rank], bad, bad, devices] for rank in range(2)]
    assert pools[2].run(on_device, Elsewhere) == expected


def test_text_goes_by_way_of_the_features_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices, answers = [], iter([torch.tensor([3, 2]), torch.tensor([97, 98, 99, 100, 101, 0])])
    monkeypatch.setattr(distributed, "_gather", lambda x, _: devices.append(x.device.type) or next(answers))
    assert distributed._gather_text("abc", torch.device("meta"), None) == ["abc", "de"]
    assert devices == ["meta"] * 2


def kinds_that_change(rank: int, world_size: int, name: str) -> list[str]:
    """Kinds of batches that all have in turn, then one of either kind at once, and the first again."""
    if name == "ClipLoss":
        loss = ClipLoss()
    else:
        loss = torch.compile(catalog.load(name).constructor(), backend="eager")
    found = []
    dtypes = F64, F64, F32, F64, (F64, F32)[rank], F64
    for rows, dtype in zip((4, 3, 4, 4 - rank, 4, 4), dtypes, strict=True):
        v, t, c = F.normalize(torch.randn(3, rows, D, dtype=dtype), dim=-1)
        inputs = {"image_features": v, "text_features": t, "logit_scale": 10.0}
        if name != "ClipLoss" and "caption_features" in input_names(name):
            inputs["caption_features"] = c
        error = error_of(functools.partial(loss, **inputs))
        found.append(error.partition(":")[0])
    return found


@pytest.mark.parametrize("name", ["ClipLoss", *OF_PACKAGES])
def test_a_kind_of_batch_seen_before_is_compared_again(pools: Pools, name: str) -> None:
    """Also by compiled losses of other packages."""
    expected = [""] * 3 + ["ValueError"] * 2 + [""]
    assert pools[2].run(kinds_that_change, name) == [expected] * 2


# --- what else processes must not get wrong ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:logit_bias is given")  # to all losses alike
def test_gather_is_read_when_it_is_needed() -> None:
    assert Gather() == Gather.of(None)
    assert Gather().place == Gather.of(False).place == (0, 1)
    assert Gather(rank=1, world_size=4).place == (1, 4)
    v, t, s, b = (x.detach() for x in leaves(1))
    assert Gather()(v, t)[0] is v
    for unready in (Gather(rank=1, world_size=4), Gather(rank=1), Gather(world_size=2)):
        for loss, _ in LOSSES.values():
            with pytest.raises(RuntimeError, match="init_process_group"):
                called(loss(gather=unready), v, t, s, b)


def refusals(rank: int, world_size: int) -> list[str]:
    v, t, s, _ = leaves(1)
    other = dist.new_group([world_size - 1])  # a group of one, which the other ranks do not belong to
    whole = dist.group.WORLD
    attempts = [
        lambda: RankConsistency(gather=Gather(rank=(rank + 1) % world_size, world_size=world_size))(v, t, s),
        lambda: ClipLoss(gather=Gather(rank=rank, world_size=world_size + 1))(v, t, s),
        lambda: Gather(rank=0, world_size=1, group=whole),
        lambda: Gather(rank=(rank + 1) % world_size, world_size=world_size, group=whole),
        lambda: all_gather(v, "gloo"),
        *([] if rank == world_size - 1 else [lambda: Gather(group=other), lambda: all_gather(v, other)]),
    ]
    return [error_of(attempt) for attempt in attempts]


def test_constants_of_one_process_have_no_gradient() -> None:
    teacher = torch.ones(2, 3, requires_grad=True)
    constant, absent = Gather().constants(teacher, None)
    assert constant is not None
    assert not constant.requires_grad
    assert torch.equal(constant, teacher)
    assert absent is None


def test_rank_and_world_size_that_are_not_the_groups_are_refused(pools: Pools) -> None:
    for rank, messages in enumerate(pools[2].run(refusals)):
        assert all(re.search(f"ValueError: .*rank {rank} of 2.*rank=", x) for x in messages[:4]), messages
        assert all(x.startswith("ValueError: group ") for x in messages[4:]), messages


def not_finite(rank: int, world_size: int) -> list[Tensor]:
    """Values with a NaN in rank 0's images; of SigLIP, which sends no image, the gradient of the texts."""
    found = []
    for flags, (name, (make, _)) in itertools.product(FLAGS, LOSSES.items()):
        if name == "mimicry":  # whose teacher must be finite
            continue
        inputs = leaves(1)
        if rank == 0:
            inputs[0].data[0, 0] = math.nan
        value, _, of_texts, *_ = differentiated(called(make(gather=of_flags(flags)), *inputs), inputs)
        is_siglip = name.startswith("siglip")
        found += [] if is_siglip and not flags[1] else [of_texts.sum() if is_siglip else value]
    for budget in (None, 0):  # in no row of rank 1's, which ignores the others
        v, t, s, _ = leaves(1)
        v, t = torch.full_like(v, -math.inf) if rank == 0 else v.detach(), t.abs()
        equal_ids = {"pair_ids": torch.zeros(N, dtype=torch.int64)}
        found.append(ClipLoss(same_id="ignore", memory_budget=budget)(v, t, s, **equal_ids).detach())
    return found


def test_nan_of_one_rank_is_seen_by_all(pools: Pools) -> None:
    for found in pools[2].run(not_finite):
        assert all(x.isnan() for x in found)


def remarks(rank: int, world_size: int) -> list[str]:
    """The lines that rankloss logs while a loss is built and trained."""
    v, t, s, _ = leaves(1)
    with TestCase().assertLogs("rankloss", logging.INFO) as caught:
        logging.getLogger("rankloss").info("a line, without which there may be none")
        for flags in FLAGS:
            loss = RankConsistency(gather=of_flags(flags))
            for _ in range(2):
                loss(v, t, s)
        RankClipLoss().set_epoch(1, 1)
    return [record.getMessage() for record in caught.records[1:]]


def test_the_first_process_alone_warns_once(pools: Pools) -> None:
    first, *others = pools[3].run(remarks)
    assert [re.split("[: ]", message)[0] for message in first] == ["local_loss", "epochs=1"]
    assert others == [[], []]
