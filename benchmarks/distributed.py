"""Cost per process of the loss of a batch of fixed N that W processes share: part of ``make bench``.

Real gloo processes on this machine, one thread each, with ``gather_with_grad`` and with and without
``local_loss``. More processes than cores wait for each other, so the processor's seconds are counted beside
those of the clock. Writes ``distributed.json`` and ``distributed.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from contenders import D, batch
from measure import conditions  # also puts tests/ where the next imports are found
from rankloss import Gather, RankClipLoss
from report import benchmark, markdown_table, parser_of, under

# isort: split
from collectives import Collectives
from process_pool import Pools

WORLD_SIZES = (1, 2, 4)


def sent_bytes(n: int, d: int, world_size: int) -> float:
    """Bytes that a process sends in a step, by docs/engine.md: forward, and twice as many backward."""
    return 3 * (world_size - 1) / world_size * 2 * n * d * 4


def measure_rank(rank: int, world_size: int, n: int, d: int, local_loss: bool, rounds: int) -> dict[str, Any]:
    """A rank's costs; the first step warms up and is counted, the others are timed."""
    v, t, s = batch(n, d)
    own = slice(rank * n // world_size, (rank + 1) * n // world_size)
    v, t = (x.detach()[own].requires_grad_() for x in (v, t))
    criterion = RankClipLoss(schedule="constant", gather=Gather(local_loss=local_loss))
    criterion(v, t, s)  # the first compares what the processes bring
    with Collectives() as calls:
        criterion(v, t, s).backward()
    clock, processor = [], []
    for _ in range(rounds):
        dist.barrier()
        before = time.perf_counter(), time.process_time()
        criterion(v, t, s).backward()
        clock.append(time.perf_counter() - before[0])
        processor.append(time.process_time() - before[1])
    return {
        "gathered_bytes": calls.filled["allgather"],
        "reduced_bytes": calls.filled["allreduce"],
        "seconds": statistics.median(clock),
        "processor_seconds": statistics.median(processor),
    }


def report(results: dict[str, Any]) -> str:
    """The Markdown that a run leaves, from the content of its ``distributed.json``."""
    c = results["conditions"]
    head = [
        "W", "local_loss", "rows", "gathered MiB", "reduced MiB", "sent MiB, formula",
        "seconds", "CPU seconds",
    ]  # fmt: skip
    rows = []
    for r in results["runs"]:
        sent = sent_bytes(c["n"], c["d"], r["world_size"])
        mebibytes = [f"{x / 2**20:.2f}" for x in (r["gathered_bytes"], r["reduced_bytes"], sent)]
        seconds = [f"{x:.3g}" for x in (r["seconds"], r["processor_seconds"])]
        anchors = c["n"] // r["world_size"] if r["local_loss"] else c["n"]
        rows.append([str(r["world_size"]), str(r["local_loss"]), f"{anchors:,}", *mebibytes, *seconds])
    return (
        f"RankClipLoss, N = {c['n']:,} in all, gather_with_grad, W gloo processes of "
        f"one thread. Per process and step; seconds are the slowest process's. {under(c)}\n\n"
        f"{markdown_table(head, rows)}\n"
    )


def slowest(world_size: int, local_loss: bool, ranks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One row for all ranks: the largest of each count, which in a balanced step is everyone's."""
    ranks = list(ranks)
    largest = {name: max(r[name] for r in ranks) for name in ranks[0]}
    return {**largest, "world_size": world_size, "local_loss": local_loss}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    n, d, rounds = (32, 16, 1) if args.quick else (args.n, D, 3)
    results: dict[str, Any] = {"conditions": conditions(threads=1, n=n, d=d), "runs": []}
    pools = Pools()
    try:
        for world_size in WORLD_SIZES:
            for local_loss in (True, False) if world_size > 1 else (True,):
                print(f"… W = {world_size}, local_loss={local_loss}", file=sys.stderr, flush=True)
                ranks = pools[world_size].run(measure_rank, n, d, local_loss, rounds)
                results["runs"].append(slowest(world_size, local_loss, ranks))
    finally:
        pools.close()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--n", type=int, default=2048, help="pairs in all, a multiple of 4 (default: %(default)s)"
    )
    benchmark(parser.parse_args(argv), "distributed", measure, report, ("distributed.json", "distributed.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
