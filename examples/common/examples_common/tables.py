"""One table, as Markdown for files and as text for a terminal."""

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

Rows = Sequence[Sequence[str]]


def markdown(head: Sequence[str], rows: Rows, *, right: int = 0) -> str:
    """Return a table in Markdown, the last ``right`` columns aligned to the right."""
    cells = [[_escaped(cell) for cell in row] for row in rows]
    frame = pd.DataFrame(cells, columns=pd.Index([_escaped(cell) for cell in head], dtype=object))
    align = ["left"] * (len(head) - right) + ["right"] * right
    return frame.to_markdown(index=False, colalign=align, disable_numparse=True)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def show(console: Console, head: Sequence[str], rows: Rows, *, right: int, title: str | None = None) -> None:
    """Print a table; a row with a single cell is the heading of those below it."""
    table = Table(title=title, box=box.SIMPLE, padding=0, show_edge=False)
    for number, name in enumerate(head):
        numeric = number >= len(head) - right
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*row, style="bold" if len(row) == 1 else "")
    console.print(table)
