"""Recall of five ways to search with a few thousand pairs, from the reports of two studies."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors

STUDIES = Path(__file__).parents[2] / "examples/studies"
WAYS = {
    "CLIP from scratch,\nlong training": ("spread", "clip"),
    "frozen encoders:\nsearch among the pairs": ("alignment", "search"),
    "… a trained head": ("alignment", "heads"),
    "… closed form (CCA)": ("alignment", "cca"),
    "… closed form and a head": ("alignment", "both"),
}
SETS = {
    "6,000 photographs": {"spread": "photographs-250-long", "alignment": "heads-photographs"},
    "8,000 icons": {"spread": "icons-250-long", "alignment": "heads-icons"},
    "1,097 emojis": {"spread": "emojis-250-long", "alignment": "heads-emojis"},
}


def mean(study: str, cell: str, arm: str) -> float:
    """Return an arm's R@10, the mean of both directions, as the report has it."""
    report = (STUDIES / study / f"report/{study}.md").read_text(encoding="utf-8")
    _, _, means = report.partition("## All arms")
    (score,) = re.findall(rf"^\| {cell} +\| +`{arm}` +\| +([\d.]+) ±", means, re.MULTILINE)
    return float(score)


def draw(colors: Colors) -> Figure:
    """A panel for each data set, with a bar for each way and its recall at the bar's end."""
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    panels = figure.subplots(1, len(SETS), sharey=True)
    names = list(WAYS)
    for axes, (title, cells) in zip(panels, SETS.items(), strict=True):
        values = [mean(study, cells[study], arm) for study, arm in WAYS.values()]
        paints = [colors.other, *[colors.ours_too] * 3, colors.ours]
        axes.barh(names, values, color=paints, height=0.62)
        for place, value in enumerate(values):
            axes.text(value + 1.5, place, f"{value:.0f}", va="center", fontsize=SMALL, color=colors.text)
        axes.set_xlim(0, 82)
        axes.set_title(title, fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    figure.supxlabel(
        "R@10: of 100 held-out items, how many have their partner among the ten best found",
        fontsize=SMALL,
        color=colors.text,
    )
    return figure
