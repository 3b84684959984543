"""Distance of the gradient of ``method="bin"`` is from that of the exact order, by the number of bins.

Independent features, and pairs that agree; an early and a late scale of CLIP's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contenders import SCALE, D, batch
from measure import conditions
from rankloss import RankConsistency
from report import benchmark, markdown_table, parser_of, under

SIZES = (1024, 4096)
BINS = (256, 512, 640, 1024, 2048)
KINDS = ("independent", "agreeing")


def features(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    v, t, _ = batch(n, d)
    if kind == "agreeing":  # texts at an angle of 45 degrees to their images
        t = F.normalize(v + t, dim=-1).detach().requires_grad_()
    return v, t


def errors(kind: str, n: int, d: int, s: float, bins: Sequence[int]) -> list[float]:
    """‖g_bin − g_sort‖ / ‖g_sort‖ for every number of bins, g the gradient by both features."""

    def gradient(criterion: RankConsistency) -> Tensor:
        inputs = features(kind, n, d)
        return torch.cat(torch.autograd.grad(criterion(*inputs, s), inputs))

    exact = gradient(RankConsistency())
    binned = (gradient(RankConsistency(method="bin", bins=b)) for b in bins)
    return [float((g - exact).norm() / exact.norm()) for g in binned]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sizes, d, bins = ((32,), 8, (4, 64)) if args.quick else (SIZES, D, BINS)
    found = {
        f"{kind}, N = {n:,}, s = {s:.3g}": errors(kind, n, d, s, bins)
        for n in sizes
        for kind in KINDS
        for s in (SCALE, 100.0)
    }
    about = conditions(threads=torch.get_num_threads(), d=d)
    return {"conditions": about, "bins": list(bins), "errors": found}


def report(results: dict[str, Any]) -> str:
    rows = [[name, *(f"{100 * x:.2f} %" for x in found)] for name, found in results["errors"].items()]
    table = markdown_table(["bins =", *(f"{b:,}" for b in results["bins"])], rows)
    about = "Relative difference of the gradient by both features from that of the exact order."
    return f"{about} {under(results['conditions'])}\n\n{table}\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    benchmark(args, "bins", measure, report, ("bin_error.json", "bin_error.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
