"""A batch of fixed N that W gloo processes of one thread share, with and without ``local_loss``.

More processes than cores wait for each other, so the processor's seconds are counted beside the clock's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from collectives import Collectives
from process_pool import Pools
from rankloss import Gather, RankClipLoss
from turns import Step

N, D, SCALE = 2048, 512, 1 / 0.07
CONTENDERS = {  # the number of processes, and local_loss
    "1": (1, True),
    "2": (2, True),
    "2-all-rows": (2, False),
    "4": (4, True),
    "4-all-rows": (4, False),
}


@functools.cache
def step(rank: int, world_size: int, n: int, d: int, local_loss: bool) -> Step:
    """A rank's forward and backward; the first call compares the processes' inputs."""
    generator = torch.Generator().manual_seed(0)
    whole = [F.normalize(torch.randn(n, d, generator=generator), dim=-1) for _ in range(2)]
    v, t = (x.chunk(world_size)[rank].clone().requires_grad_() for x in whole)
    loss = RankClipLoss(schedule="constant", gather=Gather(local_loss=local_loss))
    scale = torch.tensor(SCALE, requires_grad=True)
    return lambda: loss(v, t, scale).backward()


def timed(rank: int, world_size: int, n: int, d: int, local_loss: bool) -> float:
    """Seconds of a rank's step, once all are ready."""
    run = step(rank, world_size, n, d, local_loss)
    dist.barrier()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def counted(rank: int, world_size: int, n: int, d: int, local_loss: bool) -> dict[str, float]:
    """Bytes of a rank's collectives, and the processor's seconds, of steps after the first."""
    run = step(rank, world_size, n, d, local_loss)
    run()
    with Collectives() as calls:
        run()
    dist.barrier()
    started = time.process_time()
    run()
    return {
        "gathered_bytes": calls.filled["allgather"],
        "reduced_bytes": calls.filled["allreduce"],
        "processor_seconds": time.process_time() - started,
    }


def largest(ranks: list[Mapping[str, float]]) -> dict[str, float]:
    """The largest of every count over the ranks."""
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_processes(
    contender: str, compare: Callable[..., None], size: Callable[[int], int], pools: Pools
) -> None:
    def make(name: str) -> Callable[..., list[Any]]:
        """A function that calls another on every rank of a contender, and returns all results."""
        world_size, local_loss = CONTENDERS[name]
        return lambda function: pools[world_size].run(function, size(N), size(D), local_loss)

    compare(
        f"processes: N = {N:,}",
        contender,
        make,
        rounds=7,
        seconds=lambda on_all_ranks: max(on_all_ranks(timed)),
        count=lambda on_all_ranks: largest(on_all_ranks(counted)),
    )
