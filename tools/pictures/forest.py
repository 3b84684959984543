"""Every comparison with its interval, from the table in docs/evidence.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from style import NARROW, SMALL, WIDTH, Colors

DOCUMENT = Path(__file__).parents[2] / "docs/evidence.md"
_LINK = re.compile(r"\[(.+)\]\((.+)\)")
_NUMBERS = re.compile(r"([+−]?[\d.]+) ± ([\d.]+)")


@dataclass(frozen=True)
class Compared:
    """A row of the table: a mean paired difference in points, and half of its 95 % interval."""

    study: str
    report: str  # the study's, seen from the document
    name: str
    score: str
    mean: float
    half_width: float
    seeds: int
    tested: bool  # one of the tests that the study was made for


def comparisons(document: Path = DOCUMENT) -> list[Compared]:
    """Return the table's rows.

    Raises:
        ValueError: If a row has no link to a report, or no difference with an interval.
    """
    (section,) = re.findall(
        r"<!-- comparisons -->\n(.*?)<!-- /comparisons -->", document.read_text(encoding="utf-8"), re.DOTALL
    )
    found = []
    for line in re.findall(r"^\|.*\|$", section, re.M)[2:]:
        study, name, score, difference, seeds, role = (cell.strip() for cell in line.strip("|").split("|"))
        link, numbers = _LINK.fullmatch(study), _NUMBERS.fullmatch(difference)
        if link is None or numbers is None:
            raise ValueError(f"{document}: no [study](report), or no difference ± half an interval: {line}")
        mean, half_width = (float(number.replace("−", "-")) for number in numbers.groups())
        name = name.replace("`", "")
        found.append(Compared(*link.groups(), name, score, mean, half_width, int(seeds), role == "test"))
    return found


def draw(colors: Colors) -> Figure:
    """All comparisons, under the names of their studies."""
    return _draw(comparisons(), colors, WIDTH)


def draw_first(colors: Colors) -> Figure:
    """Those of the first study in the table."""
    rows = comparisons()
    return _draw([row for row in rows if row.study == rows[0].study], colors, NARROW)


def _draw(rows: list[Compared], colors: Colors, width: float) -> Figure:
    """One row per comparison; the tests that count are filled and coloured."""
    studies: dict[str, list[Compared]] = {}
    for row in rows:
        studies.setdefault(row.study, []).append(row)
    sizes = [len(of) for of in studies.values()]
    figure = Figure(figsize=(width, 0.7 + 0.25 * sum(sizes) + 0.45 * len(sizes)), layout="constrained")
    panels = figure.subplots(len(studies), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (study, of) in zip(panels, studies.items(), strict=True):
        for y, row in enumerate(of):
            color = colors.ours if row.tested else colors.other
            looks = {"color": color, "mfc": color if row.tested else "none"}
            axes.errorbar(row.mean, y, xerr=row.half_width, fmt="o", ms=5, lw=1.6, **looks)
        # What all rows of a study share stands in its title.
        named = [(row.name.replace(" less plain ", " − ").replace(" less ", " − "), row.score) for row in of]
        common = [words[0] for words in zip(*named, strict=True) if len(set(words)) == 1]
        labels = [", ".join(word for word in words if word not in common) for words in named]
        axes.set_title(f"{study} ({', '.join(common)})" if common else study, loc="right", fontsize=SMALL)
        counted = [f"{label} ({row.seeds})" for label, row in zip(labels, of, strict=True)]
        axes.set_yticks(range(len(of)), counted, fontsize=SMALL)
        axes.set_ylim(len(of) - 0.5, -0.5)
        axes.axvline(0, color=colors.text, lw=1, ls="--")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    figure.supxlabel(
        "points, 95 % interval (seeds); filled: the tests that count", fontsize=SMALL, color=colors.text
    )
    return figure
