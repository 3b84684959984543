"""Time and memory of the losses against N, and whether the targets are met: part of ``make bench``.

Writes ``results.json``, ``table.md``, ``scaling_time.png`` and ``scaling_memory.png``. Memory is measured in
a fresh process for every loss and N. Time is measured for all losses in turns, in one process an N, up to
N = 4,096; above, for open_clip's losses and ours in their place, as far as theirs fit. Of other losses
one run takes up to minutes there, and the time is that of the process that measured the memory.

Two questions alone, in minutes::

    python benchmarks/scaling.py --n 4096 --losses ClipLoss rankclip-distill
    python benchmarks/scaling.py --n 16384 --losses {ClipLoss,SigLipLoss}{,\\ streamed}
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from contenders import D
from measure import conditions, in_fresh_process, measure_memory, measure_time
from scaling_report import Point, fill, plot, report

LINEAR = ("ClipLoss streamed", "SigLipLoss streamed", "RankConsistency sort", "RankConsistency bin")
LARGE = ("ClipLoss", "SigLipLoss", *LINEAR)  # at --largest
LOSSES = (*LARGE, "naive terms", "RankClipLoss bin", "rankclip-distill")
PAIRS = (("ClipLoss", "ClipLoss streamed"), ("SigLipLoss", "SigLipLoss streamed"))  # in turns at every N
NAIVE_UP_TO = 4096
IN_TURNS_UP_TO = 4096
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
LARGEST = 32768
_GIB = 2**30


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="default: %(default)s")
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="default: %(default)s")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=LOSSES, metavar="LOSS", help="default: all"
    )
    parser.add_argument("--largest", action="store_true", help=f"also N = {LARGEST:,}, for what fits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--memory-limit", type=float, default=8.0, metavar="GIB",
        help="leave out a point that, quadratically from the last, would add more (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    parser.add_argument("--results", type=Path, help="measure nothing: report this results.json again")
    parser.add_argument("--write", type=Path, help="also fill the table into this file, between its markers")
    args = parser.parse_args(argv)
    if min(args.n) < 2:
        parser.error(f"argument --n: every N must be at least 2; got {min(args.n)}")
    if args.quick:
        args.n, args.largest = (32, 64), False
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results else measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    text = report(results)
    content = {"results.json": json.dumps(results, indent=2) + "\n", "table.md": text}
    for name, what in content.items():
        (args.output / name).write_text(what, encoding="utf-8")
    plots = plot(results, args.output)
    if args.write:
        fill(args.write, "scaling", text)
    print(text)
    print("Wrote", *(args.output / name for name in content), *plots, *([args.write] if args.write else []))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    d = 16 if args.quick else D
    started_under = conditions(threads=args.threads, d=d)
    notes: list[str] = []
    points: dict[tuple[str, int], Point] = {}
    sizes = [(n, args.losses) for n in sorted(args.n)]
    if args.largest:
        sizes.append((LARGEST, [loss for loss in LARGE if loss in args.losses]))
    for n, losses in sizes:
        for loss in losses:
            why_not = _reason_to_skip(loss, n, points, args.memory_limit)
            if why_not:
                notes.append(f"{loss} at N = {n:,}: left out, {why_not}.")
                continue
            _say(f"memory of {loss}, N = {n:,}")
            try:
                found = in_fresh_process(measure_memory, loss, n, d, args.threads)
            except BrokenProcessPool:
                notes.append(f"{loss} at N = {n:,}: its process was killed.")
                continue
            alone = found.pop("seconds")
            points[loss, n] = Point(loss, n, seconds_alone=alone, **found)
        here = [loss for loss in losses if (loss, n) in points]
        if n > IN_TURNS_UP_TO:
            here = [loss for pair in PAIRS if all(loss in here for loss in pair) for loss in pair]
        if here:
            _say(f"time of {len(here)} losses in turns, N = {n:,}")
            rounds = 1 if args.quick else max(3, min(15, 15 * 1024 // n))
            times = in_fresh_process(measure_time, here, n, d, args.threads, rounds)
            for loss in here:
                points[loss, n] = points[loss, n]._replace(seconds=times[loss].median)
    ordered = sorted(points.values(), key=lambda p: (LOSSES.index(p.loss), p.n))
    return {
        "conditions": started_under,
        "points": [p._asdict() for p in ordered],
        "step": None if args.quick else _step(args.threads),
        "notes": notes,
    }


def _reason_to_skip(loss: str, n: int, points: dict[tuple[str, int], Point], limit: float) -> str | None:
    if loss == "naive terms" and n > NAIVE_UP_TO:
        return f"measured up to N = {NAIVE_UP_TO:,} only"
    earlier = [p for p in points.values() if p.loss == loss and p.n < n and p.added_bytes]
    if loss in LINEAR or not earlier:
        return None
    last = max(earlier, key=lambda p: p.n)
    assert last.added_bytes is not None
    expected = last.added_bytes * (n / last.n) ** 2 / _GIB
    return f"about {expected:.1f} GiB expected, the limit is {limit:g}" if expected > limit else None


def _step(threads: int) -> dict[str, Any]:
    from training_step import LOSSES as STEP_LOSSES
    from training_step import measure_steps

    _say("training steps of the demo's model, in turns")
    times = in_fresh_process(measure_steps, threads, 31)
    clip = times[STEP_LOSSES[0]]
    return {
        "seconds": {name: t.median for name, t in times.items()},
        "ratio": {name: t.ratio_to(clip) for name, t in times.items()},
    }


def _say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
