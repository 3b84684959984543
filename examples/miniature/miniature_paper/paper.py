"""The paper's own numbers, as far as they could be read, and their sources."""

import dataclasses
import json
from pathlib import Path

FILE = Path(__file__).with_name("paper.json")


@dataclasses.dataclass(frozen=True)
class QuotedRow:
    """A row of one of the paper's tables."""

    group: str  # the data, such as "MS-COCO, image → text"
    measure: str  # such as R@1
    values: dict[str, float | None]  # by loss, or backbone/loss; None where it could not be read


@dataclasses.dataclass(frozen=True)
class QuotedSeries:
    """A line of one of the paper's figures."""

    panel: str
    name: str
    x: list[float | None]  # None for a level without a position
    y: list[float]


@dataclasses.dataclass(frozen=True)
class Quoted:
    """Numbers of one of the paper's exhibits."""

    source: str  # its name in the paper
    setting: str  # what it was trained with
    rows: tuple[QuotedRow, ...] = ()  # if it is a table
    series: tuple[QuotedSeries, ...] = ()  # if it is a plot
    read_off: float | None = None  # how exactly a figure's values could be measured; None for printed numbers
    note: str = ""  # what has to be known to read them


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper."""

    title: str
    venue: str
    arxiv: str
    reading: str  # how the numbers were read
    exhibits: dict[str, Quoted]  # by the names of grid.EXHIBITS


def load() -> Paper:
    """Read the numbers."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    exhibits = {}
    for name, found in content["exhibits"].items():
        rows = tuple(QuotedRow(**row) for row in found.pop("rows", ()))
        series = tuple(QuotedSeries(**line) for line in found.pop("series", ()))
        exhibits[name] = Quoted(**found, rows=rows, series=series)
    return Paper(**content["paper"], reading=content["reading"], exhibits=exhibits)
