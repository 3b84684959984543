"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .metrics import standard_error


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        data: What it was measured on.
        task: ``zero-shot``, ``probe``, ``retrieval`` or ``geometry``.
        metric: Its name, such as ``top-1`` or ``image_to_text R@5``.
        value: The value.
        n: Number of items.
        chance: What guessing would score, where that means something.
        percent: Whether the value is a share of the items, in percent.
    """

    data: str
    task: str
    metric: str
    value: float
    n: int
    chance: float | None = None
    percent: bool = True

    @property
    def error(self) -> float | None:
        """Binomial standard error of a percentage; it holds for independent items."""
        return standard_error(self.value, self.n) if self.percent else None


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE, padding=(0, 1), show_edge=False)
    for head in ("data", "task", "metric"):
        table.add_column(head)
    for head in ("value", "± SE", "chance", "n"):
        table.add_column(head, justify="right")
    last = None
    for result in results:
        new = (result.data, result.task) != last
        last = (result.data, result.task)
        table.add_row(
            result.data if new else "",
            result.task if new else "",
            result.metric,
            f"{result.value:.4g}" if result.error is None else f"{result.value:.2f}",
            "" if result.error is None else f"{result.error:.2f}",
            "" if result.chance is None else f"{result.chance:.2f}",
            f"{result.n:,}",
        )
    console.print(table)


def save(path: Path, results: Sequence[Result], conditions: dict[str, Any]) -> None:
    """Write results and conditions as JSON."""
    content = {
        "conditions": conditions,
        "results": [{**dataclasses.asdict(result), "standard_error": result.error} for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
