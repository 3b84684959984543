"""The paper's own numbers, as far as they could be read, and where from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

FILE = Path(__file__).with_name("paper.json")


@dataclasses.dataclass(frozen=True)
class QuotedRow:
    """A row of one of the paper's tables.

    Attributes:
        group: The data, such as ``MS-COCO, image → text``.
        measure: What is measured, such as ``R@1``.
        values: The printed number of each loss, or ``backbone/loss``; None where it could not be read.
    """

    group: str
    measure: str
    values: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class QuotedSeries:
    """A line of one of the paper's figures.

    Attributes:
        panel: The panel that it is in.
        name: What the line is.
        x: Positions; None for a level without one.
        y: Values.
    """

    panel: str
    name: str
    x: tuple[float | None, ...]
    y: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Quoted:
    """What one of the paper's exhibits says.

    Attributes:
        source: Its name in the paper.
        setting: What it was trained with.
        rows: Its rows, if it is a table.
        series: Its lines, if it is a plot.
        read_off: How exactly a figure's values could be measured; None for printed numbers.
        note: What has to be known to read them.
    """

    source: str
    setting: str
    rows: tuple[QuotedRow, ...] = ()
    series: tuple[QuotedSeries, ...] = ()
    read_off: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper.

    Attributes:
        title: Its title.
        venue: Where it appeared.
        arxiv: Its number on arXiv.
        reading: How the numbers were read.
        exhibits: Tables and figures by the names of :data:`miniature_paper.grid.EXHIBITS`.
    """

    title: str
    venue: str
    arxiv: str
    reading: str
    exhibits: dict[str, Quoted]


def load(path: Path = FILE) -> Paper:
    """Read the numbers."""
    content = json.loads(path.read_text(encoding="utf-8"))
    exhibits = {}
    for name, found in content["exhibits"].items():
        rows = tuple(QuotedRow(**row) for row in found.pop("rows", ()))
        series = tuple(
            QuotedSeries(s["panel"], s["name"], tuple(s["x"]), tuple(s["y"])) for s in found.pop("series", ())
        )
        exhibits[name] = Quoted(**found, rows=rows, series=series)
    return Paper(**content["paper"], reading=content["reading"], exhibits=exhibits)
