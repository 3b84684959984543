"""What the loss of a batch of fixed N costs a process when W of them share it: part of ``make bench``.

Real gloo processes on this machine, one thread each, with ``gather_with_grad`` and with and without
``local_loss``. More processes than cores wait for each other, so the processor's seconds are counted beside
those of the clock. Writes ``distributed.json`` and ``distributed.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from contenders import D, batch
from measure import conditions  # also puts tests/ where the next imports are found
from rankloss import Gather, RankClipLoss
from scaling_report import fill, markdown_table, save

# isort: split
from collectives import Collectives
from process_pool import Pools

WORLD_SIZES = (1, 2, 4)
PROJECTED_TO = (256, 65536)  # W, N
PRODUCTS = 12  # of n×N×D: the similarities of four kinds of lists, and for each the gradients by both factors
_MIB = 2**20


class Rows(TorchDispatchMode):
    """Counts the anchors whose lists are computed while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "rankloss::row_lists":
            image, _, image_anchors, *_ = args
            self.count += len(image if image_anchors is None else image_anchors)
        return func(*args, **(kwargs or {}))


def cost(n: int, d: int, world_size: int, local_loss: bool = True, itemsize: int = 4) -> dict[str, float]:
    """What a process computes and sends in a step, by the formula of docs/performance.md."""
    share = (world_size - 1) / world_size
    features = 2 * n * d * itemsize  # of both modalities, all processes
    rows = n / world_size if local_loss else n
    return {
        "rows": rows,
        "flops": PRODUCTS * 2 * rows * n * d,
        "forward_bytes": share * features,
        "backward_bytes": 2 * share * features,
    }


def measure(
    rank: int, world_size: int, n: int, d: int, local_loss: bool, method: str, rounds: int
) -> dict[str, Any]:
    """A rank's costs; the first step warms up and is counted, the others are timed."""
    v, t, s = batch(n, d)
    own = slice(rank * n // world_size, (rank + 1) * n // world_size)
    v, t = (x.detach()[own].requires_grad_() for x in (v, t))
    criterion = RankClipLoss(
        schedule="constant", method=method, gather=Gather(local_loss=local_loss),
    )  # fmt: skip
    criterion(v, t, s)  # the first compares what the processes bring
    with Rows() as rows, Collectives() as forward:
        loss = criterion(v, t, s)
    with Collectives() as backward:
        loss.backward()
    clock, processor, sent = [], [], []
    for _ in range(rounds):
        dist.barrier()
        before = time.perf_counter(), time.process_time(), _written()
        criterion(v, t, s).backward()
        after = time.perf_counter(), time.process_time(), _written()
        for kept, a, b in zip((clock, processor, sent), before, after, strict=True):
            kept.append(None if a is None or b is None else b - a)
    return {
        "rows": rows.count,
        "calls": {"forward": dict(forward.counts), "backward": dict(backward.counts)},
        "gathered_bytes": forward.filled["allgather"],
        "reduced_bytes": backward.filled["allreduce"],
        "sent_bytes": None if None in sent else statistics.median(sent),
        "seconds": statistics.median(clock),
        "processor_seconds": statistics.median(processor),
    }


def _written() -> int | None:
    """Bytes that this process has written so far, to sockets too: gloo's messages, as the system counts."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["wchar"])


def report(results: dict[str, Any]) -> str:
    """The Markdown that a run leaves, from the content of its ``distributed.json``."""
    c = results["conditions"]
    n, d = c["n"], c["d"]
    head = [
        "W", "local_loss", "rows", "gathered MiB", "reduced MiB", "sent MiB, counted", "sent MiB, formula",
        "seconds", "CPU seconds",
    ]  # fmt: skip
    rows = []
    for r in results["runs"]:
        formula = cost(n, d, r["world_size"], r["local_loss"])
        sent = "–" if r["sent_bytes"] is None else f"{r['sent_bytes'] / _MIB:.2f}"
        rows.append(
            [
                str(r["world_size"]),
                "yes" if r["local_loss"] else "no",
                f"{r['rows']:,}",
                f"{r['gathered_bytes'] / _MIB:.2f}",
                f"{r['reduced_bytes'] / _MIB:.2f}",
                sent,
                f"{(formula['forward_bytes'] + formula['backward_bytes']) / _MIB:.2f}",
                f"{r['seconds']:.3g}",
                f"{r['processor_seconds']:.3g}",
            ]
        )
    w, large = PROJECTED_TO
    far = cost(large, D, w)
    return "\n\n".join(
        [
            f"{c['cpu']}, {c['cores']} cores, W gloo processes of one thread, load average "
            f"{c['load_average']} at the start; {c['system']}, torch {c['torch']}, rankloss {c['rankloss']}; "
            f"RankClipLoss, method={c['method']!r}, N = {n:,} in all, D = {d}, float32, gather_with_grad; "
            f"{c['date']}. Per process and step; seconds are the slowest process's.",
            markdown_table(head, rows),
            f"On paper, by the same formula: W = {w}, N = {large:,}, D = {D}, float32, both flags: "
            f"{far['rows']:,.0f} rows, {far['flops'] / 1e12:.2f} TFLOP in products, "
            f"{far['forward_bytes'] / _MIB:,.0f} MiB sent forward and "
            f"{far['backward_bytes'] / _MIB:,.0f} MiB backward.",
        ]
    ) + "\n"  # fmt: skip


def slowest(world_size: int, local_loss: bool, ranks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One row for all ranks: the largest of each count, which in a balanced step is everyone's."""
    ranks = list(ranks)
    numbers = [k for k in ranks[0] if k != "calls" and all(r[k] is not None for r in ranks)]
    largest = {k: max(r[k] for r in ranks) for k in numbers}
    return {**ranks[0], **largest, "world_size": world_size, "local_loss": local_loss}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="default: %(default)s")
    parser.add_argument("--n", type=int, default=2048, help="pairs of all processes (default: %(default)s)")
    parser.add_argument(
        "--world-sizes", type=int, nargs="+", default=WORLD_SIZES, help="default: %(default)s"
    )
    parser.add_argument("--method", choices=("sort", "bin"), default="sort", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    parser.add_argument("--results", type=Path, help="measure nothing: report this distributed.json again")
    parser.add_argument("--write", type=Path, help="also fill the table into this file, between its markers")
    args = parser.parse_args(argv)
    n, d, rounds = (32, 16, 1) if args.quick else (args.n, D, 3)
    if any(w < 1 or n % w for w in args.world_sizes):
        parser.error(f"argument --world-sizes: each must divide N = {n}; got {args.world_sizes}")

    if args.results:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    else:
        results = {"conditions": conditions(n=n, d=d, method=args.method), "runs": []}
        pools = Pools()
        try:
            for world_size in args.world_sizes:
                for local_loss in (True, False) if world_size > 1 else (True,):
                    print(f"… W = {world_size}, local_loss={local_loss}", file=sys.stderr, flush=True)
                    ranks = pools[world_size].run(measure, n, d, local_loss, args.method, rounds)
                    results["runs"].append(slowest(world_size, local_loss, ranks))
        finally:
            pools.close()
    text = report(results)
    save(args.output, "distributed", results, text)
    if args.write:
        fill(args.write, "distributed", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
