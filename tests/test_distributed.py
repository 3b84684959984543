"""Real gloo processes, one pool for all tests: every rank runs the same function and returns what it saw."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._pytree import tree_map

from batches import gradients, random_batch, relative_error
from rankloss import ClipLoss, RankClipLoss, RankConsistency
from rankloss.distributed import all_gather

N_PER_RANK, D, SCALE = 4, 6, 10.0


def _work(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            value = function(rank, world_size, *arguments)
            # A queue's thread would fail, unheard, to pickle a tensor that has a graph.
            value = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)
            results.put((rank, value, None))
        except Exception as error:  # handed to the test, which raises it
            results.put((rank, None, repr(error)))
    dist.destroy_process_group()


class Pool:
    """Processes that stay up between tests; starting one costs an import of torch."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.world_size = world_size
        self.tasks = [context.Queue() for _ in range(world_size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(
                target=_work, args=(r, world_size, port, self.tasks[r], self.results), daemon=True
            )
            for r in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for queue in self.tasks:
            queue.put((function, arguments))
        results = [self.results.get(timeout=120) for _ in range(self.world_size)]
        errors = [error for _, _, error in results if error]
        assert not errors, errors
        return [value for _, value, _ in sorted(results, key=lambda r: r[0])]

    def close(self) -> None:
        for queue in self.tasks:
            queue.put(None)
        for process in self.processes:
            process.join(30)


@pytest.fixture(scope="module", params=[2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    pool = Pool(request.param)
    yield pool
    pool.close()


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


def subgroup_gather(rank: int, world_size: int) -> list[list[float]] | None:
    group = dist.new_group([0, 1])
    alone = dist.new_group([world_size - 1])
    x = torch.tensor([[float(rank)]])
    if rank == world_size - 1:
        assert all_gather(x, alone) is x
    return all_gather(x, group).tolist() if rank < 2 else None


def test_all_gather_takes_a_group_and_one_process_gets_its_own_tensor(pool: Pool) -> None:
    assert pool.run(subgroup_gather)[:2] == [[[0.0], [1.0]]] * 2


def make(loss: str, **options: Any) -> torch.nn.Module:
    if loss == "clip":
        return ClipLoss(**options)
    if loss == "rank_clip":
        return RankClipLoss(schedule="constant", normalizer=1.0, **options)
    return RankConsistency(cross_modal=loss != "in", in_modal=loss != "cross", chunk_size=3, **options)


def shard(rank: int, world_size: int, loss: str, local_loss: bool, gather_with_grad: bool) -> list[Tensor]:
    """Value and gradients of this rank, which has its share of the batch."""
    v, t, s = random_batch(0, N_PER_RANK * world_size, D, SCALE, duplicates=2).leaves()
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    module = make(
        loss, local_loss=local_loss, gather_with_grad=gather_with_grad, rank=rank, world_size=world_size
    )
    value = module(v[own], t[own], s)
    dv, dt, ds = gradients(value, (v, t, s), 1.0)
    return [value.detach(), dv, dt, ds]


def ddp(results: list[list[Tensor]]) -> list[Tensor]:
    """What DDP makes of the ranks' gradients: their mean."""
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


def single(world_size: int, loss: str) -> list[Tensor]:
    inputs = random_batch(0, N_PER_RANK * world_size, D, SCALE, duplicates=2).leaves()
    value = make(loss)(*inputs)
    return [value.detach(), *gradients(value, inputs, 1.0)]


@pytest.mark.parametrize("loss", ["cross", "in", "clip", "rank_clip"])
@pytest.mark.parametrize("local_loss", [False, True])
def test_with_gather_with_grad_value_and_gradients_are_the_single_process_ones(
    pool: Pool, loss: str, local_loss: bool
) -> None:
    expected = single(pool.world_size, loss)
    for actual, wanted in zip(ddp(pool.run(shard, loss, local_loss, True)), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-10


@pytest.mark.parametrize("loss", ["cross", "in", "clip", "rank_clip"])
def test_with_neither_flag_towers_get_one_over_w_and_the_scale_the_whole(pool: Pool, loss: str) -> None:
    value, dv, dt, ds = single(pool.world_size, loss)
    actual = ddp(pool.run(shard, loss, False, False))
    for a, wanted in zip(actual, (value, dv / pool.world_size, dt / pool.world_size, ds), strict=True):
        assert relative_error(a, wanted) < 1e-10


def open_clip_gradients(rank: int, world_size: int) -> list[Tensor]:
    from open_clip.loss import ClipLoss as OpenClipLoss

    v, t, s = random_batch(0, N_PER_RANK * world_size, D, SCALE).leaves()
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    results = []
    for module in (OpenClipLoss, ClipLoss):
        loss = module(local_loss=True, gather_with_grad=False, rank=rank, world_size=world_size)
        value = loss(v[own], t[own], s)
        results.append(
            torch.cat([value.reshape(1), *(g.flatten() for g in gradients(value, (v, t, s), 1.0))])
        )
    return results


def test_local_loss_alone_is_approximate_as_open_clips_clip_loss_is(pool: Pool) -> None:
    pytest.importorskip("open_clip")
    for theirs, ours in pool.run(open_clip_gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    # The rank term's columns are constants there: its gradient is not the exact one, its value is.
    expected = single(pool.world_size, "cross")
    actual = ddp(pool.run(shard, "cross", True, False))
    assert relative_error(actual[0], expected[0]) < 1e-10
    assert relative_error(actual[3], expected[3]) < 1e-10
    assert 0.05 < relative_error(actual[1], expected[1]) < 1.5


def reduced(rank: int, world_size: int, reduction: str) -> list[Tensor]:
    v, t, s = random_batch(0, N_PER_RANK * world_size, D, SCALE).leaves()
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    module = RankConsistency(
        reduction=reduction, local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
    )
    value = module(v[own], t[own], s)
    return [value.detach(), *gradients(value.sum(), (v, t, s), 1.0)]


def test_sum_keeps_its_meaning_and_none_is_a_value_per_local_anchor(pool: Pool) -> None:
    inputs = random_batch(0, N_PER_RANK * pool.world_size, D, SCALE).leaves()
    value = RankConsistency(reduction="sum")(*inputs)
    expected = [value, *gradients(value, inputs, 1.0)]
    for actual, wanted in zip(ddp(pool.run(reduced, "sum")), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-10
    per_anchor = torch.cat([r[0] for r in pool.run(reduced, "none")])
    assert relative_error(per_anchor, RankConsistency(reduction="none")(*inputs)) < 1e-10


def test_without_a_process_group_one_process_works_and_several_are_refused() -> None:
    x = torch.ones(2, 3)
    assert all_gather(x) is x
    v, t, s = random_batch(0, 4, 3, 10.0).leaves()
    with pytest.raises(RuntimeError, match=r"world_size=2 needs torch\.distributed.init_process_group"):
        RankConsistency(rank=0, world_size=2)(v, t, s)
