"""Time and memory of the losses against N, and whether the targets are met: part of ``make bench``.

Writes ``results.json`` and ``table.md``. Memory is measured in a fresh process for every loss and N. Time is
measured for all losses in turns, in one process an N, up to N = 4,096; above, for open_clip's losses and ours
in their place, as far as theirs fit. Of other losses one run takes up to minutes there, and the time is that
of the process that measured the memory.

Three questions alone, in minutes::

    python benchmarks/scaling.py --n 4096 --losses ClipLoss rankclip-distill
    python benchmarks/scaling.py --n 16384 --losses {ClipLoss,SigLipLoss}{,\\ streamed}
    python benchmarks/scaling.py --n 32 256 512 --losses ClipLoss RankClipLoss --threads 1

RankClipLoss in this checkout and in another one, measured in turns::

    python benchmarks/scaling.py --against ../another/checkout
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from checkouts import measure_against, report_against
from contenders import D
from measure import conditions, in_fresh_process, measure_memory, measure_time
from report import benchmark, markdown_table, parser_of, under

CLIP, CLIP_STREAMED = "ClipLoss", "ClipLoss streamed"
SIGLIP, SIGLIP_STREAMED = "SigLipLoss", "SigLipLoss streamed"
SORT, BIN = "RankConsistency sort", "RankConsistency bin"
LINEAR = (CLIP_STREAMED, SIGLIP_STREAMED, SORT, BIN)
LOSSES = (CLIP, SIGLIP, *LINEAR, "naive terms", "RankClipLoss", "RankClipLoss bin", "rankclip-distill")
PAIRS = ((CLIP, CLIP_STREAMED), (SIGLIP, SIGLIP_STREAMED))  # in turns at every N
NAIVE_UP_TO = IN_TURNS_UP_TO = 4096
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
LARGEST = 32768
_MIB, _GIB = 2**20, 2**30
_FIT_FROM = 1024  # pairs: below, what does not grow with N counts too much


class Point(NamedTuple):
    """One loss at one N; None where it was not measured."""

    loss: str
    n: int
    seconds: float | None = None
    seconds_alone: float | None = None
    added_bytes: float | None = None
    peak_bytes: float | None = None
    saved_bytes: float | None = None

    @property
    def any_seconds(self) -> float | None:
        """In turns with the others where that was done, else alone."""
        return self.seconds if self.seconds is not None else self.seconds_alone


STEP = 128  # pairs of a training step of the demo's

# What a run is to show, set before anything was measured, for 2 CPU cores and D = 512: a quantity of one loss
# at one N, as a multiple of another's or, where that is None, in GiB.
TARGETS = [
    ("naive / sort, time", "seconds", ("naive terms", 4096), (SORT, 4096), ">=", 3),
    ("naive / sort, added memory", "added_bytes", ("naive terms", 4096), (SORT, 4096), ">=", 12),
    ("naive / bin, time", "seconds", ("naive terms", 4096), (BIN, 4096), ">=", 5),
    ("RankClipLoss bin / ClipLoss, time", "seconds", ("RankClipLoss bin", 4096), (CLIP, 4096), "<=", 4),
    ("rankclip-distill / ClipLoss, time", "seconds", ("rankclip-distill", 4096), (CLIP, 4096), "<=", 2.5),
    (f"{CLIP_STREAMED} / {CLIP}, time", "seconds", (CLIP_STREAMED, 4096), (CLIP, 4096), "<=", 1.3),
    (f"{CLIP_STREAMED} / {CLIP}, time", "seconds", (CLIP_STREAMED, 16384), (CLIP, 16384), "<=", 1.3),
    (f"{CLIP_STREAMED}, added memory", "added_bytes", (CLIP_STREAMED, LARGEST), None, "<=", 1),
    (f"{SIGLIP_STREAMED} / {SIGLIP}, time", "seconds", (SIGLIP_STREAMED, 4096), (SIGLIP, 4096), "<=", 1.3),
    (f"{SIGLIP_STREAMED} / {SIGLIP}, time", "seconds", (SIGLIP_STREAMED, 16384), (SIGLIP, 16384), "<=", 1.3),
    (f"{SIGLIP_STREAMED}, added memory", "added_bytes", (SIGLIP_STREAMED, LARGEST), None, "<=", 1),
    (f"{SORT}, added memory", "added_bytes", (SORT, 16384), (SORT, 8192), "<=", 2.2),
    (f"{BIN}, added memory", "added_bytes", (BIN, 16384), (BIN, 8192), "<=", 2.2),
    (f"{SORT}, whole process", "peak_bytes", (SORT, LARGEST), None, "<=", 2),
    (f"{BIN}, whole process", "peak_bytes", (BIN, LARGEST), None, "<=", 2),
    ("demo's step, rankclip / clip", "seconds", ("--loss rankclip", STEP), ("--loss clip", STEP), "<=", 1.03),
]


def targets(points: Iterable[Point]) -> list[list[str]]:
    """Rows of a table: what is to be shown, the bound, what was measured, whether it is met."""
    at = {(p.loss, p.n): p for p in points}
    rows = []
    for what, of, above, below, side, bound in TARGETS:
        of_other = _GIB if below is None else getattr(at.get(below), of, None)
        value = ratio(getattr(at.get(above), of, None), of_other)
        form = "{:.2f} GiB" if below is None else "{:.2f}×"
        cells = ["not measured", "–"]
        if value is not None:
            met = value >= bound if side == ">=" else value <= bound
            cells = [form.format(value), "yes" if met else "**no**"]
        n = f"{above[1]:,}" if below is None or below[1] == above[1] else f"{above[1]:,} / {below[1]:,}"
        bounded = ("at least " if side == ">=" else "at most ") + form.format(bound)
        rows.append([f"{what}, N = {n}", bounded, *cells])
    return rows


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def exponent(ns: Sequence[float], values: Sequence[float | None]) -> float | None:
    """p of ``values ∝ N^p``, by least squares of the logarithms; None below two points."""
    kept = [(n, v) for n, v in zip(ns, values, strict=True) if n >= _FIT_FROM and v]
    if len(kept) < 2:
        return None
    n, v = np.log(np.array(kept, dtype=float)).T
    return float(np.polyfit(n, v, 1)[0])


def report(results: dict[str, Any]) -> str:
    """The Markdown that a run leaves, from the content of its ``results.json``."""
    points, c = [Point(**p) for p in results["points"]], results["conditions"]
    parts = [
        under(c),
        "**Time of forward and backward, seconds.** Losses at one N ran in turns in one process (median); "
        "with *, a single run in a process of its own. In brackets: as a multiple of ClipLoss's.",
        _by_loss(points, lambda p: p.any_seconds, _seconds_cell(points)),
        "**Added memory, MiB**: the peak during forward and backward above what was resident before, each in "
        "a fresh process. In brackets: what forward keeps for backward, where it was counted.",
        _by_loss(points, lambda p: p.added_bytes, _memory_cell),
        f"p: fitted exponent, ∝ N^p, from N = {_FIT_FROM:,}.",
    ]
    steps = (results.get("step") or {"ratio": {}})["ratio"]
    judged = targets([*points, *(Point(name, STEP, x) for name, x in steps.items())])
    parts += ["**Targets**, as measured in this run."]
    parts += [markdown_table(["what", "target", "measured", "met"], judged)]
    return "\n\n".join([*parts, *(f"- {note}" for note in results.get("notes", ()))]) + "\n"


def _by_loss(
    points: Sequence[Point], of: Callable[[Point], float | None], cell: Callable[[Point], str]
) -> str:
    """A row a loss, a column an N, and the exponent."""
    ns = sorted({p.n for p in points})
    at = {(p.loss, p.n): p for p in points}
    rows = []
    for loss in dict.fromkeys(p.loss for p in points):
        values = [None if (loss, n) not in at else of(at[loss, n]) for n in ns]
        p = exponent(ns, values)
        cells = ["–" if x is None else cell(at[loss, n]) for n, x in zip(ns, values, strict=True)]
        rows.append([loss, *cells, "–" if p is None else f"{p:.2f}"])
    return markdown_table(["N =", *(f"{n:,}" for n in ns), "p"], rows)


def _seconds_cell(points: Sequence[Point]) -> Callable[[Point], str]:
    clip = {p.n: p.seconds for p in points if p.loss == "ClipLoss"}

    def cell(p: Point) -> str:
        times = ratio(p.seconds, clip.get(p.n))
        text = f"{p.any_seconds:.3g}" + ("*" if p.seconds is None else "")
        return text if times is None or p.loss == "ClipLoss" else f"{text} ({times:.1f}×)"

    return cell


def _memory_cell(p: Point) -> str:
    assert p.added_bytes is not None
    saved = "" if p.saved_bytes is None else f" ({p.saved_bytes / _MIB:.1f})"
    return f"{p.added_bytes / _MIB:,.1f}{saved}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    d = 16 if args.quick else D
    threads = args.threads or torch.get_num_threads()
    started_under = conditions(threads=threads, d=d)
    notes: list[str] = []
    points: dict[tuple[str, int], Point] = {}
    sizes = [(n, args.losses) for n in sorted((32, 64) if args.quick else args.n or SIZES)]
    if args.largest and not args.quick:
        sizes.append((LARGEST, [loss for loss in LINEAR if loss in args.losses]))
    for n, losses in sizes:
        for loss in losses:
            if loss == "naive terms" and n > NAIVE_UP_TO:
                continue
            _say(f"memory of {loss}, N = {n:,}")
            try:
                found = in_fresh_process(measure_memory, loss, n, d, threads)
                points[loss, n] = Point(loss, n, **found)
            except BrokenProcessPool:
                notes.append(f"{loss} at N = {n:,}: left out, its process was killed.")
        here = [loss for loss in losses if (loss, n) in points]
        if n > IN_TURNS_UP_TO:
            here = [loss for pair in PAIRS if all(loss in here for loss in pair) for loss in pair]
        if here:
            _say(f"time of {len(here)} losses in turns, N = {n:,}")
            rounds = 1 if args.quick else max(3, min(100, 15 * 1024 // n))
            times = in_fresh_process(measure_time, here, n, d, threads, rounds)
            for loss in here:
                points[loss, n] = points[loss, n]._replace(seconds=times[loss].median)
    ordered = sorted(points.values(), key=lambda p: (LOSSES.index(p.loss), p.n))
    return {
        "conditions": started_under,
        "points": [p._asdict() for p in ordered],
        "step": None if args.quick or args.losses is not LOSSES else _step(threads),
        "notes": notes,
    }


def _step(threads: int) -> dict[str, Any]:
    from training_step import measure_steps

    _say("training steps of the demo's model, in turns")
    times = in_fresh_process(measure_steps, threads, 31)
    return {"ratio": {name: t.ratio_to(times["--loss clip"]) for name, t in times.items()}}


def _say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--n", type=int, nargs="+", help=f"default: {SIZES}")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=LOSSES, metavar="LOSS", help="default: all"
    )
    parser.add_argument("--largest", action="store_true", help=f"also N = {LARGEST:,}, for what is linear")
    parser.add_argument("--threads", type=int, help="default: torch's number")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="compare RankClipLoss in this checkout and in another: all rows and a quarter, 1 and 2 threads",
    )
    args = parser.parse_args(argv)
    if args.against:
        benchmark(args, "against", measure_against, report_against, ("against.json", "against.md"))
    else:
        benchmark(args, "scaling", measure, report, ("results.json", "table.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
