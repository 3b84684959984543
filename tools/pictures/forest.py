"""Every comparison with its interval, from the tables in docs/evidence.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors

DOCUMENT = Path(__file__).parents[2] / "docs/evidence.md"
_LINK = re.compile(r"\[(.+)\]\((.+)\)")
_NUMBERS = re.compile(r"([+−]?[\d.]+) ± ([\d.]+)")


@dataclass(frozen=True)
class Compared:
    """A row of a table: a mean paired difference in points, and half of its 95 % interval."""

    study: str
    report: str  # the study's, seen from the document
    name: str
    other: str  # what it is compared with
    score: str
    mean: float
    half_width: float
    seeds: int
    tested: bool  # one of the tests that the study was made for


def comparisons(table: str = "comparisons", document: Path = DOCUMENT) -> list[Compared]:
    """Return the rows of the table between the markers of that name.

    Raises:
        ValueError: If a row has no link to a report, or no difference with an interval.
    """
    (section,) = re.findall(
        rf"<!-- {table} -->\n(.*?)<!-- /{table} -->", document.read_text(encoding="utf-8"), re.DOTALL
    )
    found = []
    for line in re.findall(r"^\|.*\|$", section, re.M)[2:]:
        study, name, score, difference, seeds, role = (cell.strip() for cell in line.strip("|").split("|"))
        link, numbers = _LINK.fullmatch(study), _NUMBERS.fullmatch(difference)
        if link is None or numbers is None:
            raise ValueError(f"{document}: no [study](report), or no difference ± half an interval: {line}")
        mean, half_width = (float(number.replace("−", "-")) for number in numbers.groups())
        name, _, other = name.replace("`", "").partition(" less ")
        other = other.removeprefix("plain ")
        found.append(
            Compared(*link.groups(), name, other, score, mean, half_width, int(seeds), role == "test")
        )
    return found


def draw(colors: Colors, table: str = "comparisons") -> Figure:
    """A panel for every study and what it compares with; those of one study have one scale."""
    rows = comparisons(table)
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
        "points, 95 % interval (seeds); filled: the tests that count", fontsize=SMALL, color=colors.text
    )
    return figure


def _fill(axes: Axes, rows: list[Compared], colors: Colors) -> None:
    """One line per comparison; the tests that count are filled and coloured."""
    for y, row in enumerate(rows):
        color = colors.ours if row.tested else colors.other
        looks = {"color": color, "mfc": color if row.tested else "none"}
        axes.errorbar(row.mean, y, xerr=row.half_width, fmt="o", ms=5, lw=1.6, **looks)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=colors.text, lw=1, ls="--")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
