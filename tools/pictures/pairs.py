"""Recall against the number of pairs: two frozen encoders, and models from scratch, from a study's report."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from style import SMALL, WIDTH, Colors
from ways import mean

FROZEN = {2_000: "heads-icons-2000", 8_000: "heads-icons", 35_840: "heads-icons-35840"}
SCRATCH = {2_000: "pairs-2000", 8_000: "pairs-8000", 35_840: "pairs-35840"}
STUDENTS = ("clip", "spread", "mimicry")
STUDY = "alignment"


def lines() -> dict[str, dict[int, float]]:
    """R@10 by the number of pairs, of each way."""
    frozen = {
        "frozen encoders: closed form and a head": "both",
        "frozen encoders: closed form (CCA)": "cca",
        "frozen encoders: search among the pairs": "search",
    }
    found = {
        title: {pairs: mean(STUDY, cell, arm) for pairs, cell in FROZEN.items()}
        for title, arm in frozen.items()
    }
    found["best model from scratch, 16 epochs"] = {
        pairs: max(mean(STUDY, cell, arm) for arm in STUDENTS) for pairs, cell in SCRATCH.items()
    }
    return found


def draw(colors: Colors) -> Figure:
    """A line for each way, with its name at the line's end."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    paints = (colors.ours, colors.ours_too, colors.mark, colors.other)
    for (title, values), paint in zip(lines().items(), paints, strict=True):
        axes.plot(list(values), list(values.values()), color=paint, marker="o", label=title)
    axes.set_xscale("log")
    axes.set_xticks(list(FROZEN), [f"{pairs:,}" for pairs in FROZEN])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pairs to train on: icons", fontsize=SMALL)
    axes.set_ylabel("R@10 of held-out icons", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="y")
    axes.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure
