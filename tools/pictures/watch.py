"""Curves that say whether ranking improves, from two logs of open_clip's trainer.

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
CURVES = {
    "Cross_modal_tau": "cross-modal τ",
    "Contrastive_loss": "CLIP's loss",
}
WINDOW = 10  # steps that are averaged
VALUE = r"{}: (-?[\d.]+) \("


def values(log: str) -> dict[str, list[float]]:
    """The curves of a log with a line for every step."""
    lines = [line for line in log.splitlines() if "Train Epoch:" in line]
    return {name: [float(re.findall(VALUE.format(name), line)[0]) for line in lines] for name in CURVES}


def draw(colors: Colors) -> Figure:
    """A panel for each curve, with the terms and without."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    looks = {"rankclip": (colors.ours, "-"), "clip-streamed": (colors.other, "--")}
    for axes, (name, title) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for (label, (color, line)), curves in zip(looks.items(), record, strict=True):
            means = np.convolve(curves[name], np.full(WINDOW, 1 / WINDOW), mode="valid")
            axes.plot(np.arange(len(means)) + WINDOW, means, line, color=color, label=label)
        axes.set_title(title, fontsize=SMALL)
        axes.set_xlabel(f"step; mean of {WINDOW}")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    figure.axes[0].legend(frameon=False, fontsize=SMALL)
    return figure


if __name__ == "__main__":
    kept = [values(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    RECORD.write_text(json.dumps(kept) + "\n", encoding="utf-8")
