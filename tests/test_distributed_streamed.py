"""CLIP's and SigLIP's losses on gloo processes, whole and streamed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import one_process
from batches import random_batch
from collectives import Collectives
from oracle import siglip
from process_pool import Pools
from rankloss import ClipLoss, Gather, RankClipLoss, SigLipLoss

N_PER_RANK, D = 5, 6
FLAGS = [(False, False), (False, True), (True, False), (True, True)]
LOSSES = {"clip": ClipLoss, "siglip": SigLipLoss}


def leaves(world_size: int, pairs: int = N_PER_RANK) -> tuple[Tensor, ...]:
    """Features of the whole batch, scale and bias."""
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    return (*random_batch(world_size, pairs * world_size, D, 8.0).leaves(), bias)


def shard(
    rank: int, world_size: int, name: str, options: dict[str, Any], pairs: int = N_PER_RANK
) -> list[Tensor]:
    """Value and gradients of this rank, which has its share of the batch."""
    inputs = v, t, s, b = leaves(world_size, pairs)
    own = slice(rank * pairs, (rank + 1) * pairs)
    value = LOSSES[name](**options)(v[own], t[own], s, b)
    return of(value, inputs)


def of(value: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return [value.detach(), *found]


def averaged(results: list[list[Tensor]]) -> list[Tensor]:
    """What DDP makes of the ranks' gradients."""
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def in_one_process(name: str, view: one_process.View, bias: Tensor) -> Tensor:
    if name == "clip":
        return one_process.clip(view)
    # A text has no row that would carry its gradient: a process's own texts always have one.
    first, n = view.first, len(view.text_anchors)
    texts = torch.cat([view.text[:first], view.text_anchors, view.text[first + n :]])
    return siglip(view.image_anchors, texts, view.scale, bias, first)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_value_and_gradients_follow_the_flags_rules(
    pools: Pools, world_size: int, name: str, budget: int | None, local_loss: bool, gather_with_grad: bool
) -> None:
    gather = Gather(local_loss=local_loss, gather_with_grad=gather_with_grad)
    results = pools[world_size].run(shard, name, {"gather": gather, "memory_budget": budget})
    inputs = *features, bias = leaves(world_size)
    expected = one_process.mean_loss(
        lambda view: in_one_process(name, view, bias), features, world_size, local_loss, gather_with_grad
    )
    assert_same(averaged(results), of(expected, inputs))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", [0, None])
def test_by_default_it_is_the_whole_batchs_loss(
    pools: Pools, world_size: int, name: str, budget: int | None
) -> None:
    whole, *own = pools[world_size].run(shard, name, {"memory_budget": budget}), *leaves(world_size)
    expected = LOSSES[name](gather=False)(*own)
    assert_same(averaged(whole), of(expected, tuple(own)))


def alone(rank: int, world_size: int, name: str, budget: int | None) -> tuple[list[Tensor], dict[str, int]]:
    with Collectives() as calls:
        found = shard(rank, world_size, name, {"gather": False, "memory_budget": budget})
    return found, dict(calls.counts)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", [0, None])
def test_without_gathering_a_process_has_its_own_pairs_only(
    pools: Pools, name: str, budget: int | None
) -> None:
    inputs = v, t, s, b = leaves(2)
    for rank, (found, calls) in enumerate(pools[2].run(alone, name, budget)):
        own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
        assert_same(found, of(LOSSES[name](gather=False)(v[own], t[own], s, b), inputs))
        assert calls == {}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", [0, None])
def test_one_pair_per_process_is_enough(pools: Pools, name: str, budget: int | None) -> None:
    inputs = leaves(3, pairs=1)
    results = pools[3].run(shard, name, {"memory_budget": budget}, 1)
    assert_same(averaged(results), of(LOSSES[name](gather=False)(*inputs), inputs))


def siglips_of_open_clip(
    rank: int, world_size: int, dist_impl: str, budget: int | None
) -> list[list[Tensor]]:
    from open_clip.loss import SigLipLoss as OpenClipsSigLip

    inputs = v, t, s, b = leaves(world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    layout = {"rank": rank, "world_size": world_size, "dist_impl": dist_impl}
    losses = OpenClipsSigLip(**layout), SigLipLoss(**layout, memory_budget=budget)
    return [of(loss(v[own], t[own], s, b), inputs) for loss in losses]


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather"])
@pytest.mark.parametrize("budget", [0, None])
def test_siglip_is_open_clips_however_that_exchanges_texts(
    pools: Pools, world_size: int, dist_impl: str, budget: int | None
) -> None:
    """Process by process, before DDP averages: the value, and the gradient that each gets for the batch."""
    for theirs, ours in pools[world_size].run(siglips_of_open_clip, dist_impl, budget):
        assert_same(ours, theirs)


def collectives(rank: int, world_size: int, options: dict[str, Any]) -> tuple[dict[str, int], int]:
    v, t, s, b = leaves(world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    with Collectives() as calls:
        SigLipLoss(**options)(v[own], t[own], s, b).backward()
    return dict(calls.counts), calls.filled["allgather"]


@pytest.mark.parametrize("budget", [0, None])
def test_siglip_gathers_the_texts_only(pools: Pools, budget: int | None) -> None:
    texts = 2 * N_PER_RANK * D * 8
    for calls in pools[2].run(collectives, {"memory_budget": budget}):
        assert calls == ({"allgather": 1, "allreduce": 1}, texts)
    both = {"memory_budget": budget, "gather": Gather(local_loss=False, gather_with_grad=False)}
    for calls in pools[2].run(collectives, both):
        assert calls == ({"allgather": 2}, 2 * texts)


def as_a_base(rank: int, world_size: int, budget: int | None) -> list[Tensor]:
    inputs = v, t, s, b = leaves(world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    loss = RankClipLoss(SigLipLoss(memory_budget=budget), schedule="constant", memory_budget=budget)
    return of(loss(v[own], t[own], s, b), inputs)


@pytest.mark.parametrize("budget", [0, None])
def test_rank_terms_over_siglip_are_exact_too(pools: Pools, budget: int | None) -> None:
    inputs = leaves(3)
    loss = RankClipLoss(SigLipLoss(gather=False), schedule="constant", gather=False)
    assert_same(averaged(pools[3].run(as_a_base, budget)), of(loss(*inputs), inputs))


def compiled(rank: int, world_size: int, name: str) -> list[list[Tensor]]:
    inputs = v, t, s, b = leaves(world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    eager = LOSSES[name](memory_budget=0)
    return [of(f(v[own], t[own], s, b), inputs) for f in (eager, torch.compile(eager, backend="eager"))]


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_it_gathers_as_the_eager_one(pools: Pools, name: str) -> None:
    for eager, through_dynamo in pools[2].run(compiled, name):
        assert_same(through_dynamo, eager)
