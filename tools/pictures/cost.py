"""Time and memory, from the table that ``make bench`` writes into docs/performance.md."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import NARROW, SMALL, Colors

TABLE = Path(__file__).parents[2] / "docs/performance.md"
BARS_AT = (512, 1024, 4096)
NAMES = {  # of the table, and in the pictures
    "ClipLoss": "CLIP's loss, open_clip",
    "naive": "rank terms, written naively",
    "RankConsistency": "rank terms, rankloss, sorted",
    "RankClipLoss-bin": "CLIP's loss + rank terms, rankloss, bins",
}


def measured(document: Path = TABLE) -> tuple[str, list[dict[str, list[float]]]]:
    """The machine, and of every loss in the pictures the seconds, then the MiB, at ``BARS_AT``.

    Raises:
        KeyError: if a loss or a size of the pictures is not in the document's tables.
    """
    _, _, section = document.read_text(encoding="utf-8").partition("<!-- bench:cpu -->\n")
    machine, _, _ = section.partition("\n")
    _, time, memory, *_ = section.split("\n**")  # each table follows its title, which is bold
    return machine, [_values(time), _values(memory)]


def _values(table: str) -> dict[str, list[float]]:
    """The values at ``BARS_AT`` of every loss in the pictures, from the lines of a table."""
    lines = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    (_, *sizes), *rows = (line.strip("| ").split(" | ") for line in lines)
    cells = {name: dict(zip(sizes, of_loss, strict=True)) for name, *of_loss in rows}
    return {name: [_number(cells[name][f"N = {n:,}"]) for n in BARS_AT] for name in NAMES}


def _number(cell: str) -> float:
    """The number at the beginning of a cell."""
    number, *_ = re.split(r"[* (]", cell)
    return float(number.replace(",", ""))


def draw_bars(colors: Colors) -> Figure:
    """Time and memory against the batch size: per size a bar for each loss."""
    conditions, (time, memory) = measured()
    figure = Figure(figsize=(NARROW, 3.75), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    _bars(panels[0], time, "forward and backward, s", colors, number="{:.2f}")
    _bars(panels[1], memory, "memory, MiB", colors, number="{:,.0f}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", fontsize=SMALL)
    unbroken = conditions.rstrip(".").replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    figure.supxlabel(textwrap.fill(unbroken, 62), fontsize=9)
    return figure


def _bars(axes: Axes, values: dict[str, list[float]], title: str, colors: Colors, *, number: str) -> None:
    """A group of bars for each size, with the value at each bar's end, in the format ``number``."""
    paints = (colors.other, colors.bad, colors.ours_too, colors.ours)
    gap = 0.8  # between groups, in bars
    groups = np.arange(len(BARS_AT)) * (len(NAMES) + gap)  # the place of each group's first bar
    widest = max(max(values[name]) for name in NAMES)
    for place, (name, paint) in enumerate(zip(NAMES, paints, strict=True)):
        bars = groups + place
        axes.barh(bars, values[name], color=paint, height=0.86, label=NAMES[name])
        for y, length in zip(bars, values[name], strict=True):
            axes.text(length + 0.02 * widest, y, number.format(length), va="center", fontsize=9)
    axes.set_yticks(groups + (len(NAMES) - 1) / 2, [f"N = {n:,}" for n in BARS_AT], fontsize=SMALL)
    axes.set(xlim=(0, 1.3 * widest), ylim=(groups[-1] + len(NAMES) - 0.5, -0.5), xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title, loc="left", fontsize=SMALL)
