"""Time and memory of ``RankConsistency`` over the settings within their bounds, one varied at a time.

An entry that is more than 5 times its neighbour is marked, and ends the run with status 1: nobody who moves a
setting by a step expects that. Every entry has a process of its own, which is ended after some seconds.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from contenders import batch
from measure import added_bytes, conditions, in_fresh_process
from rankloss import RankConsistency
from report import benchmark, markdown_table, parser_of, under

STEP = 5  # the largest ratio of two neighbours
LIMIT = 30  # seconds of an entry
LEAST = {"seconds": 2e-3, "bytes": 2 * 2**20}  # below, it is the fixed part that is measured
MIDDLE: dict[str, Any] = {"n": 512, "d": 64}
AXES: dict[str, tuple[Sequence[Any], dict[str, Any]]] = {  # values of a setting, and what it goes with
    "chunk_size": ((1, 2, 4, 8, 16, 64, 256, None), {}),
    "bins": ((2, 64, 640, 4096, 2**16, 2**18), {"method": "bin"}),
    "n": ((32, 64, 128, 256, 512, 1024, 2048), {}),
    "d": ((8, 32, 128, 512, 2048), {}),
}
QUICK = {"n": 16, "d": 8}


def cost(n: int, d: int, options: dict[str, Any]) -> dict[str, float]:
    """Of a forward and backward pass: the least CPU time of some, and the peak memory; in a fresh process."""
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    criterion, inputs = RankConsistency(**options), batch(n, d)
    RankConsistency(method=criterion.options.method)(*batch(16, d)).backward()  # libraries are up

    def run() -> None:
        criterion(*inputs).backward()

    found = {"bytes": added_bytes(run)}
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 1:
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return {**found, "seconds": min(seconds)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found = []
    for axis, (values, options) in AXES.items():
        for value in values[:3] if args.quick else values:
            setting = {**MIDDLE, **(QUICK if args.quick else {}), **options, axis: value}
            print(f"… {axis} = {value}", file=sys.stderr, flush=True)
            n, d = setting.pop("n"), setting.pop("d")
            try:
                entry = in_fresh_process(cost, n, d, setting)
            except BrokenProcessPool:  # it took too long, or too much memory
                entry = {"seconds": float("inf"), "bytes": float("inf")}
            found.append({"axis": axis, "value": value, **entry})
    return {"conditions": conditions(threads=1, **MIDDLE), "entries": found}


def jumps(costs: Sequence[float], least: float) -> list[bool]:
    """Which of a row of costs are more than ``STEP`` times a neighbour."""
    floored = [max(x, least) for x in costs]
    neighbours = [[*floored[max(k - 1, 0) : k], *floored[k + 1 : k + 2]] for k in range(len(floored))]
    return [x > STEP * min(near) for x, near in zip(floored, neighbours, strict=True)]


def rows(results: dict[str, Any], axis: str) -> tuple[list[dict[str, Any]], dict[str, list[bool]]]:
    """The entries of a setting, and by quantity which of them are jumps."""
    entries = [entry for entry in results["entries"] if entry["axis"] == axis]
    return entries, {of: jumps([entry[of] for entry in entries], least) for of, least in LEAST.items()}


def report(results: dict[str, Any]) -> str:
    c = results["conditions"]
    parts = [f"{under(c)} N = {c['n']} where it is not varied. Marked: more than {STEP} times a neighbour."]
    for axis in AXES:
        entries, marks = rows(results, axis)
        lines = []
        for of, label, factor in (("seconds", "CPU milliseconds", 1e3), ("bytes", "MiB", 2.0**-20)):
            cells = [f"{entry[of] * factor:,.3g}" for entry in entries]
            cells = [f"**{cell}**" if mark else cell for cell, mark in zip(cells, marks[of], strict=True)]
            lines.append([label, *cells])
        parts.append(markdown_table([f"{axis} =", *(str(entry["value"]) for entry in entries)], lines))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    results = benchmark(args, "costs", measure, report, ("costs.json", "costs.md"))
    return int(any(any(marks) for axis in AXES for marks in rows(results, axis)[1].values()))


if __name__ == "__main__":
    sys.exit(main())
