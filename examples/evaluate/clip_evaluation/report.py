"""Results as a table for people and as JSON for programs."""

import dataclasses
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from examples_common import tables
from rich.console import Console

from .metrics import standard_error


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement."""

    data: str
    task: str  # zero-shot, probe, retrieval or geometry
    metric: str  # such as top-1 or image_to_text R@5
    value: float
    n: int  # number of items
    chance: float | None = None  # what guessing would score, where that means something
    percent: bool = True  # whether the value is a share of the items

    @property
    def error(self) -> float | None:
        """Binomial standard error of a percentage; it holds for independent items."""
        return standard_error(self.value, self.n) if self.percent else None

    def cells(self) -> list[str]:
        """Return metric, value, standard error, chance and number of items as text."""
        value = f"{self.value:.2f}" if self.percent else f"{self.value:.4g}"
        optional = ("" if x is None else f"{x:.2f}" for x in (self.error, self.chance))
        return [self.metric, value, *optional, f"{self.n:,}"]


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    rows = []
    for (data, task), of_task in groupby(results, key=lambda result: (result.data, result.task)):
        first, *others = of_task
        rows += [[data, task, *first.cells()], *(["", "", *result.cells()] for result in others)]
    tables.show(console, ["data", "task", "metric", "value", "± SE", "chance", "n"], rows, right=4)


def save(path: Path, results: Sequence[Result], conditions: dict[str, Any]) -> None:
    """Write results and conditions as JSON."""
    rows = [{**dataclasses.asdict(result), "standard_error": result.error} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"conditions": conditions, "results": rows}, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
