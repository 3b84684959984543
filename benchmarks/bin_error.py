"""How far ``method="bin"`` is from the exact order, and what it saves, by the number of bins: ``make bench``.

Independent features, and pairs that agree; an early and a late scale of CLIP's. Writes ``bin_error.json`` and
``bin_error.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contenders import SCALE, D, batch
from measure import conditions, in_turns
from rankloss import RankConsistency
from report import benchmark, markdown_table, parser_of, under

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
    rows = [
        [f"{e['features']}, N = {e['n']:,}, s = {e['s']:.3g}", *(f"{100 * x:.2f} %" for x in e["errors"])]
        for e in results["errors"]
    ]
    rows += [
        [f"time, N = {x['n']:,}, as a share of sort's", *(f"{r:.2f}" for r in x["ratios"])]
        for x in results["times"]
    ]
    table = markdown_table(["bins =", *(f"{b:,}" for b in results["bins"])], rows)
    about = "Relative difference of the gradient by both features from that of the exact order."
    return f"{about} {under(results['conditions'])}\n\n{table}\n"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sizes, d, bins = ((32,), 8, (4, 64)) if args.quick else (SIZES, D, BINS)
    found = [
        {"features": name, "n": n, "s": s, "errors": errors(make, n, d, s, bins)}
        for n in sizes
        for name, make in FEATURES.items()
        for s in SCALES
    ]
    ratios = [{"n": n, "ratios": times(n, d, bins, rounds=1 if args.quick else 5)} for n in sizes]
    return {
        "conditions": conditions(threads=torch.get_num_threads(), d=d),
        "bins": list(bins),
        "errors": found,
        "times": ratios,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    benchmark(args, "bins", measure, report, ("bin_error.json", "bin_error.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
