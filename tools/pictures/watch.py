"""A curve that says whether the terms act, from two logs of open_clip's trainer.

``python tools/pictures/watch.py RANKCLIP_LOG PLAIN_LOG`` keeps their values, which the picture is drawn from.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors

RECORD = Path(__file__).parents[2] / "docs/assets/watch.json"
CURVE = "Cross_modal_tau"
WINDOW = 20  # steps that are averaged


def values(log: str) -> list[float]:
    """The curve of a log with a line for every step."""
    curve = []
    for line in log.splitlines():
        if "Train Epoch:" in line:
            value, *_ = re.findall(rf"{CURVE}: (-?[\d.]+) \(", line)
            curve.append(float(value))
    return curve


def draw(colors: Colors) -> Figure:
    """The agreement with the terms and without, and the difference of the two."""
    ranks, plain = (np.array(run) for run in json.loads(RECORD.read_text(encoding="utf-8")))
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    both, difference = figure.subplots(1, 2)
    both.plot(*averaged(ranks), "-", color=colors.ours, label="--loss rankclip")
    both.plot(*averaged(plain), "--", color=colors.other, label="--loss clip-streamed")
    both.legend(frameon=False, fontsize=SMALL)
    both.set_title("cross-modal τ", fontsize=SMALL)
    difference.plot(*averaged(ranks - plain), "-", color=colors.ours)
    difference.axhline(0, color=colors.text, lw=1)
    difference.set_title("the first minus the second", fontsize=SMALL)
    for axes in (both, difference):
        axes.set_xlabel(f"step; mean of {WINDOW}")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    return figure


def averaged(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps at the end of each window, and the means over it."""
    means = np.convolve(curve, np.full(WINDOW, 1 / WINDOW), mode="valid")
    return np.arange(len(means)) + WINDOW, means


if __name__ == "__main__":
    kept = [values(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    RECORD.write_text(json.dumps(kept) + "\n", encoding="utf-8")
