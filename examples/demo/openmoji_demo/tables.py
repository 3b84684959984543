"""Tables in Markdown."""

from collections.abc import Sequence

import pandas as pd

Rows = Sequence[Sequence[str]]


def markdown(head: Sequence[str], rows: Rows, *, right: int = 0) -> str:
    """Return a table in Markdown, the last ``right`` columns aligned to the right."""
    cells = [[_escaped(cell) for cell in row] for row in rows]
    frame = pd.DataFrame(cells, columns=pd.Index([_escaped(cell) for cell in head], dtype=object))
    align = ["left"] * (len(head) - right) + ["right"] * right
    return frame.to_markdown(index=False, colalign=align, disable_numparse=True)


def _escaped(cell: str) -> str:
    """Return a cell whose text ends neither the cell nor the row."""
    return cell.replace("|", "\\|").replace("\n", " ")
