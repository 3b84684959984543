"""Comparisons with their intervals, from the tables in docs/evidence.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors

DOCUMENT = Path(__file__).parents[2] / "docs/evidence.md"
CLIP = "CLIP"
_HEAD = re.compile(r"\[(.+)\]\((.+)\), (\d+) seeds(?:, (.+))?")
_NUMBERS = re.compile(r"(\**)([+−]?[\d.]+) ± ([\d.]+)\1")


@dataclass(frozen=True)
class Compared:
    """A cell of a table: a mean paired difference in points, and half of its 95 % interval."""

    study: str
    report: str  # the study's, seen from the document
    name: str
    other: str  # what it is compared with
    score: str
    mean: float
    half_width: float
    seeds: int
    significant: bool  # after the correction of its study: bold


def comparisons(table: str, document: Path = DOCUMENT) -> list[Compared]:
    """Return the differences of the table between the markers of that name, column by column.

    The head of the first column is ``[study](report), n seeds``, and may end in a score. A column is headed
    ``minus OTHER``, the rows being names; ``NAME minus OTHER``, the rows being scores; or by a score, the
    rows being names that are compared with CLIP.

    Raises:
        ValueError: If the head has another form, or a cell holds no difference ± half an interval.
    """
    (section,) = re.findall(
        rf"<!-- {table} -->\n(.*?)<!-- /{table} -->", document.read_text(encoding="utf-8"), re.DOTALL
    )
    lines = re.findall(r"^\|.*\|$", section, re.M)
    (first, *columns), _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    head = _HEAD.fullmatch(first)
    if head is None:
        raise ValueError(f"{document}: no [study](report), n seeds: {first}")
    study, report, seeds, shared = head.groups()
    found = []
    for number, column in enumerate(columns):
        before, minus, other = (part.strip() for part in column.partition("minus "))
        for title, *cells in rows:
            difference = _NUMBERS.fullmatch(cells[number])
            if difference is None:
                raise ValueError(f"{document}: no difference ± half an interval: {cells[number]}")
            mean, half_width = (float(x.replace("−", "-")) for x in difference.groups()[1:])
            name, score = (before, title) if before and minus else (title, shared if minus else column)
            significant = bool(difference[1])
            found.append(
                Compared(study, report, name, other or CLIP, score, mean, half_width, int(seeds), significant)
            )
    return found


def draw(colors: Colors, tables: Sequence[str]) -> Figure:
    """A panel for every study and what it compares with; those of one study have one scale."""
    rows = [row for table in tables for row in comparisons(table)]
    grouped: dict[tuple[str, str], list[Compared]] = {}
    for row in rows:
        grouped.setdefault((row.study, row.other), []).append(row)
    sizes = [len(of) for of in grouped.values()]
    figure = Figure(figsize=(WIDTH, 0.5 + 0.25 * sum(sizes) + 0.6 * len(sizes)), layout="constrained")
    places = figure.add_gridspec(len(sizes), 1, height_ratios=sizes)
    first_of: dict[str, Axes] = {}
    for place, ((study, other), of) in zip(places, grouped.items(), strict=True):
        axes = figure.add_subplot(place, sharex=first_of.get(study))
        first_of.setdefault(study, axes)
        _fill(axes, of, colors)
        # What all rows share stands in the title.
        named = [(row.name, row.score) for row in of]
        name, score = (words[0] if len(set(words)) == 1 else "" for words in zip(*named, strict=True))
        labels = [", ".join(word for word in words if word not in (name, score)) for words in named]
        counted = [f"{label} ({row.seeds})" for label, row in zip(labels, of, strict=True)]
        axes.set_yticks(range(len(of)), counted, fontsize=SMALL)
        shared = ", ".join(word for word in (f"{name or '…'} − {other}", score) if word)
        axes.set_title(f"{study} ({shared})", loc="right", fontsize=SMALL)
    figure.supxlabel(
        "points, 95 % interval (seeds); filled: significant after correction",
        fontsize=SMALL,
        color=colors.text,
    )
    return figure


def _fill(axes: Axes, rows: list[Compared], colors: Colors) -> None:
    """One line per comparison; those that are significant are filled and coloured."""
    for y, row in enumerate(rows):
        color = colors.ours if row.significant else colors.other
        looks = {"color": color, "mfc": color if row.significant else "none"}
        axes.errorbar(row.mean, y, xerr=row.half_width, fmt="o", ms=5, lw=1.6, **looks)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=colors.text, lw=1, ls="--")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
