"""How far ``method="bin"`` is from the exact order, and what it saves, by the number of bins: ``make bench``.

Independent features, and pairs that agree; an early and a late scale of CLIP's. Writes ``bin_error.json`` and
``bin_error.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contenders import SCALE, D, batch
from measure import conditions, in_turns
from rankloss import RankConsistency
from scaling_report import fill, markdown_table, save

SIZES = (1024, 4096)
BINS = (256, 512, 640, 1024, 2048)
SCALES = (SCALE, 100.0)
Features = tuple[Tensor, Tensor]


def independent(n: int, d: int) -> Features:
    v, t, _ = batch(n, d)
    return v, t


def agreeing(n: int, d: int) -> Features:
    """Texts at an angle of 45 degrees to their images."""
    v, t = independent(n, d)
    return v, F.normalize(v + t, dim=-1).detach().requires_grad_()


FEATURES: dict[str, Callable[[int, int], Features]] = {"independent": independent, "agreeing": agreeing}


def errors(
    make: Callable[[int, int], Features], n: int, d: int, s: float, bins: Sequence[int]
) -> list[float]:
    """‖g_bin − g_sort‖ / ‖g_sort‖ for every number of bins, g the gradient by both features."""

    def gradient(criterion: RankConsistency) -> Tensor:
        inputs = make(n, d)
        return torch.cat(torch.autograd.grad(criterion(*inputs, s), inputs))

    exact = gradient(RankConsistency())
    binned = (gradient(RankConsistency(method="bin", bins=b)) for b in bins)
    return [float((g - exact).norm() / exact.norm()) for g in binned]


def times(n: int, d: int, bins: Sequence[int], rounds: int) -> list[float]:
    """Seconds with each number of bins as a share of those with the sort."""
    inputs = batch(n, d)
    criteria = {0: RankConsistency(), **{b: RankConsistency(method="bin", bins=b) for b in bins}}
    measured = in_turns({str(b): (lambda c=c: c(*inputs).backward()) for b, c in criteria.items()}, rounds)
    return [measured[str(b)].ratio_to(measured["0"]) for b in bins]


def report(results: dict[str, Any]) -> str:
    c, bins = results["conditions"], results["bins"]
    rows = [
        [f"{e['features']}, N = {e['n']:,}, s = {e['s']:.3g}", *(f"{100 * x:.2f} %" for x in e["errors"])]
        for e in results["errors"]
    ]
    rows += [
        [f"time, N = {x['n']:,}, as a share of sort's", *(f"{r:.2f}" for r in x["ratios"])]
        for x in results["times"]
    ]
    head = ["bins =", *(f"{b:,}" for b in bins)]
    return (
        f"Relative difference of the gradient by both features from that of the exact order. {c['cpu']}, "
        f"{c['threads']} threads, torch {c['torch']}, rankloss {c['rankloss']}, D = {c['d']}, float32; "
        f"{c['date']}.\n\n{markdown_table(head, rows)}\n"
    )


def measure(sizes: Sequence[int], d: int, bins: Sequence[int], rounds: int) -> dict[str, Any]:
    found = [
        {"features": name, "n": n, "s": s, "errors": errors(make, n, d, s, bins)}
        for n in sizes
        for name, make in FEATURES.items()
        for s in SCALES
    ]
    return {
        "conditions": conditions(threads=torch.get_num_threads(), d=d),
        "bins": list(bins),
        "errors": found,
        "times": [{"n": n, "ratios": times(n, d, bins, rounds)} for n in sizes],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works")
    parser.add_argument("--results", type=Path, help="measure nothing: report this bin_error.json again")
    parser.add_argument("--write", type=Path, help="also fill the table into this file, between its markers")
    args = parser.parse_args(argv)
    if args.results:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    else:
        results = measure((32,), 8, (4, 64), 1) if args.quick else measure(SIZES, D, BINS, rounds=5)
    text = report(results)
    save(args.output, "bin_error", results, text)
    if args.write:
        fill(args.write, "bins", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
