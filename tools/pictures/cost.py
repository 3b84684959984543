"""Time and memory, from the table that ``make bench`` writes into docs/performance.md."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import NARROW, SMALL, Colors

TABLE = Path(__file__).parents[2] / "docs/performance.md"
BARS_AT = (1024, 2048, 4096)
NAMES = {  # of the table, and in the pictures
    "ClipLoss": "CLIP's loss, open_clip",
    "naive terms": "rank terms, written naively",
    "RankConsistency sort": "rank terms, rankloss, sorted",
    "RankClipLoss bin": "CLIP's loss + rank terms, rankloss, bins",
}


@dataclass(frozen=True)
class Measured:
    """The figures of one run: seconds and MiB by loss and batch size, and what they were measured on."""

    conditions: str
    time: dict[str, dict[int, float]]
    memory: dict[str, dict[int, float]]


def measured(document: Path = TABLE) -> Measured:
    """The figures in the document.

    Raises:
        ValueError: if a loss of the pictures is not in the document's tables.
    """
    (section,) = re.findall(
        r"<!-- bench:scaling -->\n(.*?)<!-- /bench:scaling -->",
        document.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    conditions, _, rest = section.partition("\n")
    time, memory = (_figures(part) for part in rest.split("**Added memory")[:2])
    for table in (time, memory):
        if missing := NAMES.keys() - table.keys():
            raise ValueError(f"{document} has no figures of {', '.join(sorted(missing))}")
    return Measured(conditions, time, memory)


def _figures(text: str) -> dict[str, dict[int, float]]:
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)
    ]
    sizes = [int(cell.replace(",", "")) for cell in rows[0][1:-1]]
    return {
        name: {
            n: float(number[0].replace(",", ""))
            for n, cell in zip(sizes, cells, strict=False)
            if (number := re.match(r"[\d,.]+", cell))
        }
        for name, *cells in rows[2:]
    }


def draw_bars(colors: Colors) -> Figure:
    """Time and memory against the batch size: per size a bar for each loss."""
    figures = measured()
    figure = Figure(figsize=(NARROW, 3.75), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    _bars(panels[0], figures.time, "forward and backward, s", colors, "{:.2f}")
    _bars(panels[1], figures.memory, "added memory, MiB", colors, "{:,.0f}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", fontsize=SMALL)
    figure.supxlabel(_conditions(figures.conditions, 62), fontsize=9)
    return figure


def _bars(axes: Axes, values: dict[str, dict[int, float]], title: str, colors: Colors, number: str) -> None:
    looks = _colors(colors)
    groups = np.arange(len(BARS_AT)) * (len(NAMES) + 0.8)
    widest = max(values[name][n] for name in NAMES for n in BARS_AT)
    for k, (name, label) in enumerate(NAMES.items()):
        lengths = [values[name][n] for n in BARS_AT]
        axes.barh(groups + k, lengths, color=looks[name], height=0.86, label=label)
        for y, length in zip(groups + k, lengths, strict=True):
            axes.text(length + 0.02 * widest, y, number.format(length), va="center", fontsize=9)
    axes.set_yticks(groups + (len(NAMES) - 1) / 2, [f"N = {n:,}" for n in BARS_AT], fontsize=SMALL)
    axes.set(xlim=(0, 1.3 * widest), ylim=(groups[-1] + len(NAMES) - 0.5, -0.5), xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title, loc="left", fontsize=SMALL)


def _colors(colors: Colors) -> dict[str, str]:
    return dict(zip(NAMES, (colors.other, colors.bad, colors.ours_too, colors.ours), strict=True))


def _conditions(conditions: str, letters: int) -> str:
    """The line above the table, in lines that fit the picture."""
    unbroken = conditions.rstrip(".").replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return textwrap.fill(unbroken, letters)
