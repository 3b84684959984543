"""A cell of a CSV file that has swallowed rows, as a quotation mark at its beginning makes it."""

from __future__ import annotations

import os
import re
from typing import Any

_BLOCK = 2**20  # bytes
_COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst", ".tar")  # endings of files that pandas unpacks
_LINE_BREAK = re.compile(r"[\r\n]")  # old files have "\r" alone


def may_swallow_rows(path: str) -> bool:
    """True if a file has a quotation mark, without which no cell holds more than its part of a line.

    A compressed file may have one that its bytes do not show: True. An address that is no local file has
    unknown contents: False.
    """
    if not os.path.isfile(path):
        return False
    if path.lower().endswith(_COMPRESSED):
        return True
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            if b'"' in block:
                return True
    return False


def check_cells(table: Any, path: str, separator: str) -> None:
    """Raise a ValueError for a cell that holds a separator and a line break.

    A cell that begins with a quotation mark ends at the next one, be it rows later: the rows between are part
    of it. Every reader of CSV files reads so, open_clip's too.

    Args:
        table: The file as pandas has it.
        path: The file.
        separator: Between its columns; a regular expression if it is longer than a character, as in pandas.

    Example:
        >>> import pandas
        >>> check_cells(pandas.DataFrame({"title": ['a "big" dog', "a cat, a mat"]}), "pairs.csv", ",")
    """
    if os.path.isfile(path) and not may_swallow_rows(path):  # as most files: their cells need no look
        return
    pattern = re.compile(separator if len(separator) > 1 else re.escape(separator))
    for name in table.columns:
        if table[name].dtype.kind in "biufc":  # booleans and numbers
            continue
        for row, cell in enumerate(table[name]):
            if isinstance(cell, str) and _LINE_BREAK.search(cell) and pattern.search(cell):
                first_line, *others = cell.splitlines()
                raise ValueError(
                    f"row {row} of {path}, column {name!r}: the cell {first_line!r:.60} goes on for "
                    f"{len(others)} more lines, up to a second quotation mark, and holds what may be rows of "
                    'the table; a text that begins with a quotation mark is written """like this"" and on", '
                    "and one with line breaks without them"
                )
