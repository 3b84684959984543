"""Effect of eleven ways to learn from a teacher, and of RankCLIP, on R@10, from their reports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from forest import comparisons
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import NARROW, SMALL, Colors

REPORTS = Path(__file__).parents[2] / "examples/studies/miniature/report"
SCORE = "R@10, both ways"
STUDIES = {  # report: settings of its confirmation, as the picture names them
    "distil": {
        "clip": "CLIP",
        "mimicry-8": "feature mimicry",
        "contrast-2-20": "interactive contrast",
        "relation-256-10": "contrastive relation",
        "softmax-4-20": "softmax of all matrices",
        "pearson-16-10": "row-wise Pearson",
        "distances-327.68": "relational distances",
        "top-ranks-64-4": "a teacher's ranks",
        "ranks-in-memory-64-4": "ranks, teacher in memory",
        "sentence-encoder-8-2": "a sentence encoder's ranks",
        "two-rivals-8-2": "mimicry and contrast",
        "ranks-and-rival-16-16": "mimicry and ranks",
    },
    "question": {"clip": "CLIP", "rankclip-recipe": "RankCLIP"},
}
_BEYOND = 0.8  # points from a mean to its number, which is clear of the interval
_CELL = re.compile(r"([\d.]+) ± ([\d.]+) \((\d+)\)")


@dataclass(frozen=True)
class Recall:
    """A setting's mean over seeds, and half of its 95 % interval, in percent."""

    name: str
    mean: float
    half_width: float
    seeds: int


def recalls(study: str) -> list[Recall]:
    """The settings of a study, from the table of its confirmation, the lowest first.

    Raises:
        KeyError: If the table has no such setting or score.
    """
    report = (REPORTS / f"{study}.md").read_text(encoding="utf-8")
    table = re.findall(r"^\|.*\|$", report.partition("## The confirmation")[2], re.MULTILINE)
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]
    cells = {name: dict(zip(rows[0], [name, *of], strict=False)) for name, *of in rows}
    found = []
    for setting, name in STUDIES[study].items():
        mean, half_width, seeds = _CELL.findall(cells[setting][SCORE])[0]
        found.append(Recall(name, float(mean), float(half_width), int(seeds)))
    return sorted(found, key=lambda row: row.mean)


def pairs_of(study: str) -> str:
    """Number of pairs that the students of a study were trained on, as its report says."""
    report = (REPORTS / f"{study}.md").read_text(encoding="utf-8")
    return re.findall(r"; ([\d,]+) pairs, batches of", report)[0]


def draw(colors: Colors) -> Figure:
    """A panel for each study, what ranks coloured; one scale, which shows how small the second effect is."""
    shown = {study: recalls(study) for study in STUDIES}
    sizes = [len(rows) for rows in shown.values()]
    figure = Figure(figsize=(NARROW, 4.6), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, height_ratios=sizes)
    difference = comparisons("question")[0]
    paired = f" ({difference.mean:+.2f} ± {difference.half_width:.2f})"
    for axes, (study, rows) in zip(panels, shown.items(), strict=True):
        _fill(axes, rows, colors, note=paired if study == "question" else "")
        axes.set_title(f"{pairs_of(study)} icons, {rows[0].seeds} seeds", loc="left", fontsize=SMALL)
    figure.supxlabel(
        "R@10 among unseen concepts, %, with 95 % intervals;\nin brackets the difference, paired by seed",
        fontsize=SMALL,
    )
    return figure


def _fill(axes: Axes, rows: list[Recall], colors: Colors, note: str) -> None:
    """A bar for each setting, with its interval and its number, and behind the last one a note."""
    looks = [colors.ours if "rank" in row.name.lower() else colors.other for row in rows]
    means, errors = [row.mean for row in rows], [row.half_width for row in rows]
    axes.barh(range(len(rows)), means, xerr=errors, color=looks, ecolor=colors.text, height=0.7)
    for y, row in enumerate(rows):
        text = f"{row.mean:.2f}{note if row is rows[-1] else ''}"
        axes.text(row.mean + _BEYOND, y, text, va="center", fontsize=SMALL)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=SMALL)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 23.5))
    axes.tick_params(labelbottom=False)
    axes.spines["bottom"].set_visible(False)
