"""Real gloo processes against one process: what the losses make of a batch that is spread over ranks."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import one_process
from batches import gradients, random_batch, relative_error
from collectives import Collectives
from process_pool import Pool, Pools
from rankloss import ClipLoss, Gather, RankClipLoss, RankConsistency, distributed
from rankloss.distributed import all_gather

N_PER_RANK, D, SCALE = 4, 6, 10.0
LOSSES = ["cross", "in", "clip", "rank_clip"]
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
EXACT = [(False, True), (True, True)]


def gather_and_differentiate(rank: int, world_size: int) -> tuple[list[list[float]], list[list[float]]]:
    x = torch.full((2, 1), float(rank), requires_grad=True)
    y = all_gather(x)
    # Every rank weighs the whole by another factor: the gradient has to add them up.
    ((rank + 1) * torch.arange(1, 2 * world_size + 1.0)[:, None] * y).sum().backward()
    return y.tolist(), x.grad.tolist()


def test_all_gather_concatenates_and_sums_the_gradients_of_all_ranks(pool: Pool) -> None:
    w = pool.world_size
    total = sum(range(1, w + 1))
    for rank, (gathered, gradient) in enumerate(pool.run(gather_and_differentiate)):
        assert gathered == [[float(r)] for r in range(w) for _ in range(2)]
        assert gradient == [[total * (2.0 * rank + 1)], [total * (2.0 * rank + 2)]]


def differentiate_twice(rank: int, world_size: int) -> list[float]:
    x = torch.tensor([1.0 + rank, 0.5], dtype=torch.float64, requires_grad=True)
    loss = (rank + 1) * all_gather(x).pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.pow(2).sum().backward()
    return x.grad.tolist()


def test_all_gather_is_differentiated_twice(pool: Pool) -> None:
    total = sum(range(1, pool.world_size + 1))  # Σ_w L_w = total·Σ x³, its gradient's square 9·total²·x⁴
    for rank, second in enumerate(pool.run(differentiate_twice)):
        assert second == pytest.approx([36 * total**2 * x**3 for x in (1.0 + rank, 0.5)])


def differentiate_in_half_precision(rank: int, world_size: int) -> tuple[torch.dtype, list[float]]:
    x = torch.zeros(6, dtype=torch.bfloat16, requires_grad=True)
    y = all_gather(x)
    one_is_large = torch.arange(len(y)) % world_size == rank
    (y * torch.where(one_is_large, 256.0, 1.0).bfloat16()).sum().backward()
    return x.grad.dtype, x.grad.tolist()


def test_gradients_in_half_precision_are_summed_in_float32(pools: Pools) -> None:
    # 256 + 1 is 256 in bfloat16, so (256 + 1) + 1 would be 256 as well.
    assert pools[3].run(differentiate_in_half_precision) == [(torch.bfloat16, [258.0] * 6)] * 3


def parity_group(rank: int, world_size: int) -> Any:
    """This process's group, of two, the even and the odd ranks: its ranks are not the default group's."""
    groups = [dist.new_group(list(range(parity, world_size, 2))) for parity in (0, 1)]
    return groups[rank % 2]


def gather_in_groups(rank: int, world_size: int) -> tuple[bool, list[list[float]], list[list[float]]]:
    group = parity_group(rank, world_size)
    x = torch.full((1, 1), float(rank), requires_grad=True)
    y = all_gather(x, group)
    ((rank + 1) * y).sum().backward()
    return y is x, y.tolist(), x.grad.tolist()


def test_all_gather_takes_a_group_and_one_process_gets_its_own_tensor(pool: Pool) -> None:
    for rank, (is_own, gathered, gradient) in enumerate(pool.run(gather_in_groups)):
        members = range(rank % 2, pool.world_size, 2)
        assert gathered == [[float(r)] for r in members]
        assert gradient == [[float(sum(r + 1 for r in members))]]
        assert is_own == (len(members) == 1)


def module(loss: str, **options: Any) -> torch.nn.Module:
    if loss == "clip":
        return ClipLoss(**options)
    if loss == "rank_clip":
        return RankClipLoss(schedule="constant", normalizer=1.0, **options)
    return RankConsistency(cross_modal=loss != "in", in_modal=loss != "cross", chunk_size=3, **options)


def batch(
    size: int, dtype: torch.dtype = torch.float64, seed: int = 0, duplicates: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return random_batch(seed, size, D, SCALE, duplicates=duplicates).leaves(dtype)


def shard(
    rank: int,
    world_size: int,
    loss: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    duplicates: int = 2,
) -> list[Tensor]:
    """Value and gradients of this rank, which has its share of the batch."""
    v, t, s = batch(N_PER_RANK * world_size, dtype, duplicates=duplicates)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    value = module(loss, **options)(v[own], t[own], s)
    return [value.detach(), *gradients(value, (v, t, s), 1.0)]


def flags(local_loss: bool, gather_with_grad: bool, **options: Any) -> dict[str, Any]:
    return {"gather": Gather(local_loss=local_loss, gather_with_grad=gather_with_grad), **options}


def ddp(results: list[list[Tensor]]) -> list[Tensor]:
    """What DDP makes of the ranks' gradients: their mean."""
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


def single(world_size: int, loss: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    inputs = batch(N_PER_RANK * world_size, dtype)
    value = module(loss, **options)(*inputs)
    return [value.detach(), *gradients(value, inputs, 1.0)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_value_in_float32_is_the_single_process_one(
    pool: Pool, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    value, *_ = ddp(pool.run(shard, loss, flags(local_loss, gather_with_grad), torch.float32))
    assert relative_error(value, single(pool.world_size, loss, torch.float32)[0]) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_value_and_gradients_follow_the_flags_rules(
    pool: Pool, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    w = pool.world_size
    inputs = batch(N_PER_RANK * w, duplicates=0)
    value = one_process.mean_loss(one_process.LOSSES[loss], inputs, w, local_loss, gather_with_grad)
    results = pool.run(shard, loss, flags(local_loss, gather_with_grad), torch.float64, 0)
    assert_equal(ddp(results), [value, *gradients(value, inputs, 1.0)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), EXACT)
def test_with_gather_with_grad_value_and_gradients_are_the_single_process_ones(
    pool: Pool, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    actual = ddp(pool.run(shard, loss, flags(local_loss, gather_with_grad)))
    assert_equal(actual, single(pool.world_size, loss))


@pytest.mark.parametrize("loss", LOSSES)
def test_with_neither_flag_towers_get_one_over_w_and_the_scale_the_whole(pool: Pool, loss: str) -> None:
    value, dv, dt, ds = single(pool.world_size, loss)
    actual = ddp(pool.run(shard, loss, flags(False, False)))
    assert_equal(actual, [value, dv / pool.world_size, dt / pool.world_size, ds])


@pytest.mark.parametrize("loss", LOSSES)
def test_with_local_loss_alone_value_and_scale_are_exact_and_towers_are_not(pool: Pool, loss: str) -> None:
    expected = single(pool.world_size, loss)
    value, dv, dt, ds = ddp(pool.run(shard, loss, flags(True, False)))
    assert_equal([value, ds], [expected[0], expected[3]])
    for actual, exact in ((dv, expected[1]), (dt, expected[2])):
        assert 0.05 < relative_error(actual, exact) < 1.5


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3, "discount": "log"}, {"worth": "shifted"}, {"reduction": "sum"}],
    ids=lambda options: "-".join(options),
)
def test_every_option_shards_exactly(pool: Pool, options: dict[str, Any]) -> None:
    actual = ddp(pool.run(shard, "rank", flags(True, True, **options)))
    assert_equal(actual, single(pool.world_size, "rank", **options))


@pytest.mark.parametrize("gather_with_grad", [False, True])
def test_batch_list_is_whole_on_every_rank(pool: Pool, gather_with_grad: bool) -> None:
    value, dv, dt, ds = single(pool.world_size, "rank", lists="batch")
    share = 1 if gather_with_grad else pool.world_size
    results = pool.run(shard, "rank", flags(False, gather_with_grad, lists="batch"))
    assert_equal(ddp(results), [value, dv / share, dt / share, ds])
    assert all(torch.equal(value_of_rank, results[0][0]) for value_of_rank, *_ in results)


def one_pair(rank: int, world_size: int, loss: str) -> list[Tensor]:
    v, t, s = batch(world_size, duplicates=0)
    own = slice(rank, rank + 1)
    value = module(loss, **flags(True, True))(v[own], t[own], s)
    return [value.detach(), *gradients(value, (v, t, s), 1.0)]


def test_one_pair_per_process_is_a_batch_of_w(pool: Pool) -> None:
    inputs = batch(pool.world_size, duplicates=0)
    for loss in ("rank", "rank_clip"):
        value = module(loss)(*inputs)
        assert_equal(ddp(pool.run(one_pair, loss)), [value, *gradients(value, inputs, 1.0)])


def per_anchor(rank: int, world_size: int) -> list[Tensor]:
    v, t, s = batch(N_PER_RANK * world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    values = RankConsistency(**flags(True, True, reduction="none"))(v[own], t[own], s)
    weights = torch.arange(1.0, len(v) + 1, dtype=torch.float64)[own]
    return [values.detach(), *gradients(values, (v, t, s), weights)]


def test_reduction_none_is_a_value_per_local_anchor(pool: Pool) -> None:
    inputs = batch(N_PER_RANK * pool.world_size)
    values = RankConsistency(reduction="none")(*inputs)
    weights = torch.arange(1.0, len(values) + 1, dtype=torch.float64)
    results = pool.run(per_anchor)
    assert_equal([torch.cat([values for values, *_ in results])], [values])
    summed = [torch.stack(x).sum(0) for x in list(zip(*results, strict=True))[1:]]
    assert_equal(summed, gradients(values, inputs, weights))


def accumulate(
    rank: int, world_size: int, loss: str, options: dict[str, Any], micro_batches: int
) -> list[list[Tensor]]:
    """The gradient in one pass, and as open_clip's trainer accumulates it: one micro-batch after another has
    a graph, and the others are the constants that a first pass left.
    """
    v, t, s = batch(N_PER_RANK * world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    criterion = module(loss, **options)
    value = criterion(v[own], t[own], s)
    whole = [value.detach(), *gradients(value, (v, t, s), 1.0)]
    accumulated = []
    for j in range(micro_batches):
        v_j, t_j = (
            torch.cat([x if i == j else x.detach() for i, x in enumerate(f[own].chunk(micro_batches))])
            for f in (v, t)
        )
        value = criterion(v_j, t_j, s)
        accumulated.append([value.detach(), *gradients(value, (v, t, s), 1.0)])
    sums = [torch.stack(x).sum(0) for x in zip(*accumulated, strict=True)]
    return [whole, [sums[0] / micro_batches, *sums[1:]]]


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_accumulation_gives_towers_the_big_batch_and_the_scale_k_times(
    pool: Pool, local_loss: bool, gather_with_grad: bool, micro_batches: int
) -> None:
    results = pool.run(accumulate, "rank_clip", flags(local_loss, gather_with_grad), micro_batches)
    value, dv, dt, ds = ddp([whole for whole, _ in results])
    assert_equal(ddp([sums for _, sums in results]), [value, dv, dt, micro_batches * ds])


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_in_one_process(micro_batches: int) -> None:
    for loss in LOSSES:
        (value, dv, dt, ds), accumulated = accumulate(0, 1, loss, {}, micro_batches)
        assert_equal(accumulated, [value, dv, dt, micro_batches * ds])


def shard_of_group(
    rank: int, world_size: int, loss: str, local_loss: bool, gather_with_grad: bool
) -> list[Tensor]:
    """As :func:`shard`; the even and the odd ranks have a batch each and know nothing of each other."""
    group = parity_group(rank, world_size)
    size, position = dist.get_world_size(group), dist.get_rank(group)
    v, t, s = batch(N_PER_RANK * size, seed=rank % 2, duplicates=0)
    own = slice(position * N_PER_RANK, (position + 1) * N_PER_RANK)
    gather = Gather(local_loss=local_loss, gather_with_grad=gather_with_grad, group=group)
    value = module(loss, gather=gather)(v[own], t[own], s)
    return [value.detach(), *gradients(value, (v, t, s), 1.0)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_losses_take_a_group_and_look_no_further(
    pool: Pool, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    results = pool.run(shard_of_group, loss, local_loss, gather_with_grad)
    for parity in (0, 1):
        of_group = results[parity::2]
        w = len(of_group)
        inputs = batch(N_PER_RANK * w, seed=parity, duplicates=0)
        value = one_process.mean_loss(one_process.LOSSES[loss], inputs, w, local_loss, gather_with_grad)
        assert_equal(ddp(of_group), [value, *gradients(value, inputs, 1.0)])


def alone(rank: int, world_size: int) -> list[Any]:
    """With world_size=1: values, and the number of collective calls."""
    results: list[Any] = []
    inputs = batch(N_PER_RANK)
    with Collectives() as calls:
        for loss in LOSSES:
            value = module(loss, gather=Gather(rank=0, world_size=1))(*inputs)
            results.append([value.detach(), *gradients(value, inputs, 1.0)])
        if world_size == 1:
            value = RankConsistency(gather=Gather(group=dist.group.WORLD))(*inputs)
            results.append([value.detach(), *gradients(value, inputs, 1.0)])
    return [results, sum(calls.counts.values()), all_gather(inputs[0]) is inputs[0]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_world_size_one_gathers_nothing_though_a_group_is_initialised(pools: Pools, world_size: int) -> None:
    for results, calls, is_own in pools[world_size].run(alone):
        for actual, loss in zip(results, [*LOSSES, "rank"], strict=False):
            assert_equal(actual, single(1, loss))
        assert len(results) == (5 if world_size == 1 else 4)
        assert calls == 0
        assert is_own == (world_size == 1)


def with_gather(rank: int, world_size: int, criterion: torch.nn.Module) -> tuple[list[Tensor], int]:
    """Of a loss that was built elsewhere, where there was no process group."""
    v, t, s = batch(N_PER_RANK * world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    with Collectives() as calls:
        value = criterion(v[own], t[own], s)
    return [value.detach(), *gradients(value, (v, t, s), 1.0)], sum(calls.counts.values())


@pytest.mark.parametrize(
    ("loss", "options"),
    [*((loss, {}) for loss in LOSSES), ("rank", {"lists": "batch"}), ("rank_clip", {"lists": "batch"})],
)
def test_default_is_the_whole_default_group_exactly(pool: Pool, loss: str, options: dict[str, Any]) -> None:
    results = pool.run(with_gather, module(loss, **options))
    assert_equal(ddp([values for values, _ in results]), single(pool.world_size, loss, **options))


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gathering_each_process_has_its_own_pairs(pools: Pools, loss: str) -> None:
    for rank, (values, calls) in enumerate(pools[2].run(with_gather, module(loss, gather=False))):
        inputs = batch(2 * N_PER_RANK)
        own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
        expected = module(loss)(inputs[0][own], inputs[1][own], inputs[2])
        assert_equal(values, [expected.detach(), *gradients(expected, inputs, 1.0)])
        assert calls == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gather_with_grad": "no"}, "gather_with_grad must be one of True, False; got 'no'"),
        ({"local_loss": 1}, "local_loss must be one of True, False; got 1"),
        ({"world_size": 2.5}, "world_size must be an integer of at least 1; got 2.5"),
        ({"world_size": 0}, "world_size must be an integer of at least 1; got 0"),
        ({"rank": "0"}, "rank must be an integer of at least 0; got '0'"),
        ({"rank": -1}, "rank must be an integer of at least 0; got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\); got rank=2, world_size=2"),
        ({"group": "gloo"}, None),
    ],
)
def test_gather_refuses_what_it_cannot_be(options: dict[str, Any], message: str | None) -> None:
    if message is None:  # without a process group there is nothing to compare it with
        assert Gather(**options).place == (0, 1)
        return
    with pytest.raises(ValueError, match=message):
        Gather(**options)


def test_gather_is_read_when_it_is_needed() -> None:
    assert Gather() == Gather.of(None)
    assert Gather().place == Gather.of(False).place == (0, 1)
    assert Gather(rank=1, world_size=4).place == (1, 4)
    v, t, _ = (x.detach() for x in batch(4))
    assert Gather()(v, t)[0] is v
    for unready in (Gather(rank=1, world_size=4), Gather(rank=1), Gather(world_size=2)):
        with pytest.raises(RuntimeError, match=r"needs torch\.distributed\.init_process_group"):
            unready(v, t)


def open_clips_keywords(rank: int, world_size: int) -> list[tuple[tuple[int, int], float, float]]:
    v, t, s = batch(N_PER_RANK)
    v = v * (1 if rank else -1)
    whole = ClipLoss(gather=Gather(local_loss=False, gather_with_grad=False))
    given = [
        {"local_loss": False},
        {"gather_with_grad": True},
        {"local_loss": True, "gather_with_grad": True},
        {"cache_labels": True},
        {"world_size": 1},
        {"rank": rank, "world_size": world_size},
    ]
    return [
        (loss.gather.place, loss(v, t, s).item(), whole(v, t, s).item())
        for loss in (ClipLoss(**g) for g in given)
    ]


def test_open_clips_keywords_have_open_clips_defaults(pools: Pools) -> None:
    for rank, results in enumerate(pools[2].run(open_clips_keywords)):
        for place, value, whole in results[:-1]:
            assert place == (0, 1)
            assert abs(value - whole) > 1e-3
        place, value, whole = results[-1]
        assert place == (rank, 2)
        assert value == pytest.approx(whole, rel=1e-12)


def in_one_tensor(rank: int, world_size: int, loss: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """As :func:`shard`, by the collectives of one tensor; with their counts and the bytes that they fill."""
    distributed._TENSOR_BACKENDS = frozenset({"gloo"})
    try:
        v, t, s = batch(N_PER_RANK * world_size, dtype)
        own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
        with Collectives() as forward:
            value = module(loss, **options)(v[own], t[own], s)
        with Collectives() as backward:
            found = gradients(value, (v, t, s), 1.0)
        return [value.detach(), *found], dict(forward.filled), dict(backward.counts)
    finally:
        distributed._TENSOR_BACKENDS = frozenset({"nccl"})


ONE_TENSOR = pytest.mark.skipif(
    not hasattr(dist, "all_gather_single"), reason="this version's gloo does not reduce into one tensor"
)


@ONE_TENSOR
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_collectives_of_one_tensor_give_the_same(
    pools: Pools, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    for world_size in (2, 3):
        options = flags(local_loss, gather_with_grad)
        expected = pools[world_size].run(shard, loss, options)
        results = pools[world_size].run(in_one_tensor, loss, options, torch.float64)
        for (values, forward, backward), of_rank in zip(results, expected, strict=True):
            assert_equal(values, of_rank, 1e-14)
            assert list(forward.values()) == [2 * world_size * N_PER_RANK * D * 8]
            assert all("reduce_scatter" in name for name in backward)
            assert sum(backward.values()) == (2 if gather_with_grad else 0)


@ONE_TENSOR
def test_half_precision_is_gathered_as_it_is(pools: Pools) -> None:
    for values, forward, _ in pools[2].run(in_one_tensor, "rank", flags(True, True), torch.bfloat16):
        assert list(forward.values()) == [2 * 2 * N_PER_RANK * D * 2]
        assert [x.dtype for x in values] == [torch.float32, *[torch.bfloat16] * 3]


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("nccl", "cuda", True),
        ("gloo", "cpu", False),
        ("gloo", "cuda", False),
        ("cpu:gloo,cuda:nccl", "cuda", True),
        ("cpu:gloo,cuda:nccl", "cpu", False),
        ("undefined", "cuda", True),
        ("undefined", "cpu", False),
        ("mpi", "cpu", False),
    ],
)
def test_collectives_are_chosen_by_the_backend_of_the_device(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, expected: bool
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda _: backend)
    features = SimpleNamespace(device=torch.device(device))
    assert distributed._has_tensor_collectives(features, None) is expected


def refusals(rank: int, world_size: int) -> list[str]:
    v, t, s = batch(N_PER_RANK)
    other = dist.new_group([world_size - 1])  # a group of one, which the other ranks do not belong to
    whole = dist.group.WORLD
    attempts = [
        lambda: RankConsistency(gather=Gather(rank=(rank + 1) % world_size, world_size=world_size))(v, t, s),
        lambda: ClipLoss(rank=rank, world_size=world_size + 1)(v, t, s),
        lambda: Gather(rank=0, world_size=1, group=whole),
        lambda: Gather(rank=(rank + 1) % world_size, world_size=world_size, group=whole),
        lambda: Gather(rank=0, world_size=2, group="gloo"),
        lambda: all_gather(v, "gloo"),
        *([] if rank == world_size - 1 else [lambda: Gather(group=other), lambda: all_gather(v, other)]),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_rank_and_world_size_that_are_not_the_groups_are_refused(pools: Pools) -> None:
    outsider, member = pools[2].run(refusals)
    mine = "this process has rank {} of 2 in its process group; got rank={}, world_size={}"
    no_group = "group must be a process group that this process belongs to; got "
    for rank, messages in enumerate((outsider, member)):
        assert messages[:6] == [
            mine.format(rank, 1 - rank, 2),
            mine.format(rank, rank, 3),
            mine.format(rank, 0, 1),
            mine.format(rank, 1 - rank, 2),
            no_group + "'gloo'",
            no_group + "'gloo'",
        ]
    assert all(message.startswith(no_group) for message in outsider[6:])
    assert (len(outsider), len(member)) == (8, 6)


def test_without_a_process_group_one_process_works_and_several_are_refused() -> None:
    x = torch.ones(2, 3)
    assert all_gather(x) is x
    v, t, s = random_batch(0, 4, 3, 10.0).leaves()
    assert RankConsistency(**flags(True, True))(v, t, s).item() == RankConsistency()(v, t, s).item()
    for loss in LOSSES:
        with pytest.raises(RuntimeError, match=r"world_size=2 needs torch\.distributed.init_process_group"):
            module(loss, gather=Gather(rank=0, world_size=2))(v, t, s)


def not_finite(rank: int, world_size: int, options: dict[str, Any]) -> float:
    v, t, s = (x.detach() for x in batch(N_PER_RANK))
    if rank == 0:
        v[0, 0] = math.nan
    return module("rank", **options)(v, t, s).item()


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_nan_of_one_rank_is_seen_by_all(pools: Pools, local_loss: bool, gather_with_grad: bool) -> None:
    assert all(map(math.isnan, pools[2].run(not_finite, flags(local_loss, gather_with_grad))))


def logged(call: Callable[[], object], level: int) -> list[str]:
    """What rankloss logs during a call."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("rankloss")
    former = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        call()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)
    return [record.getMessage() for record in records]


def warnings(rank: int, world_size: int, loss: str, options: dict[str, Any]) -> list[str]:
    def train() -> None:
        v, t, s = batch(N_PER_RANK)
        criterion = module(loss, **options)
        for _ in range(2):
            criterion(v, t, s)

    return logged(train, logging.WARNING)


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
@pytest.mark.parametrize("loss", ["rank", "rank_clip"])
def test_local_loss_without_gather_with_grad_is_warned_of_once(
    pool: Pool, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    first, *others = pool.run(warnings, loss, flags(local_loss, gather_with_grad))
    if local_loss and not gather_with_grad:
        assert len(first) == 1
        assert "local_loss without gather_with_grad" in first[0]
    else:
        assert first == []
    assert others == [[]] * (pool.world_size - 1)


def remarks_on_a_ramp(
    rank: int, world_size: int, epochs: int, gather: Gather | Literal[False] | None
) -> list[str]:
    return logged(lambda: RankClipLoss(gather=gather).set_epoch(1, epochs), logging.INFO)


@pytest.mark.parametrize("gather", [None, False])
@pytest.mark.parametrize("epochs", [1, 2])
def test_ramp_of_few_epochs_is_remarked_on_by_the_first_process_alone(
    pools: Pools, epochs: int, gather: Gather | Literal[False] | None
) -> None:
    first, second = pools[2].run(remarks_on_a_ramp, epochs, gather)
    (remark,) = first
    assert remark.startswith(f"epochs={epochs} ")
    assert second == []


def calls_of_a_step(
    rank: int, world_size: int, loss: str, options: dict[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    v, t, s = batch(N_PER_RANK)
    criterion = module(loss, **options)
    with Collectives() as forward:
        value = criterion(v, t, s)
    with Collectives() as backward:
        value.backward()
    return dict(forward.counts), dict(backward.counts)


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
@pytest.mark.parametrize("loss", ["rank", "rank_clip"])  # the second with CLIP's own loss, of one pass
def test_step_gathers_each_modality_once(
    pools: Pools, loss: str, local_loss: bool, gather_with_grad: bool
) -> None:
    for forward, backward in pools[2].run(calls_of_a_step, loss, flags(local_loss, gather_with_grad)):
        assert forward == {"allgather": 2}
        assert backward == ({"allreduce": 2} if gather_with_grad else {})


def of_one_gathering(
    rank: int, world_size: int, options: dict[str, Any], lambda_: float
) -> tuple[dict[str, int], list[list[Tensor]]]:
    """Two losses of what is gathered once, beside the same of what each has gathered for itself."""
    v, t, s = batch(N_PER_RANK * world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    losses = RankClipLoss(schedule=lambda i, n: lambda_, **options), RankConsistency(**options)
    losses[0].set_epoch(1, epochs=2)
    with Collectives() as calls:
        gathered = losses[1].gather(v[own], t[own])
        shared = sum(loss(v[own], t[own], s, gathered=gathered) for loss in losses)
    separate = sum(loss(v[own], t[own], s) for loss in losses)
    return dict(calls.counts), [[x.detach(), *gradients(x, (v, t, s), -1.3)] for x in (shared, separate)]


@pytest.mark.parametrize("lambda_", [0.0, 1.0])  # at 0 the base computes for itself
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_one_gathering_serves_several_losses(
    pools: Pools, local_loss: bool, gather_with_grad: bool, lambda_: float
) -> None:
    results = pools[2].run(of_one_gathering, flags(local_loss, gather_with_grad), lambda_)
    for counts, (shared, separate) in results:
        assert counts == {"allgather": 2}
        assert_equal(shared, separate, 1e-14)


def compiled(rank: int, world_size: int, options: dict[str, Any]) -> list[list[Tensor]]:
    v, t, s = batch(N_PER_RANK * world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    eager = module("rank_clip", **options)
    results = []
    for criterion in (eager, torch.compile(eager, backend="eager")):
        value = criterion(v[own], t[own], s)
        results.append([value.detach(), *gradients(value, (v, t, s), 1.0)])
    return results


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), [(True, True), (False, False)])
def test_compiled_loss_gathers_as_the_eager_one(
    pools: Pools, local_loss: bool, gather_with_grad: bool
) -> None:
    for eager, through_dynamo in pools[2].run(compiled, flags(local_loss, gather_with_grad)):
        assert_equal(through_dynamo, eager)


def open_clips_and_ours(rank: int, world_size: int, options: dict[str, bool]) -> list[list[Tensor]]:
    from open_clip.loss import ClipLoss as OpenClipLoss

    v, t, s = batch(N_PER_RANK * world_size)
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    results = []
    for loss in (OpenClipLoss, ClipLoss):
        value = loss(rank=rank, world_size=world_size, **options)(v[own], t[own], s)
        results.append([value.detach(), *gradients(value, (v, t, s), 1.0)])
    return results


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_clip_loss_is_open_clips_under_every_flag(
    pool: Pool, local_loss: bool, gather_with_grad: bool
) -> None:
    for theirs, ours in pool.run(
        open_clips_and_ours, {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    ):
        assert_equal(ours, theirs)
