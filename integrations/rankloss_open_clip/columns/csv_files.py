"""Data beside pairs: columns of a CSV file, read once, and members of a webdataset sample."""

from __future__ import annotations

import functools
import os
from typing import Any

from rankloss_features.csv_cells import check_cells, may_swallow_rows


def read_columns(path: str, separator: str, *names: str) -> list[Any]:
    """Columns of a CSV file, which is read once for all calls; see :func:`forget_files`.

    Raises:
        ValueError: There is no such column or no row, or a cell has swallowed rows.
    """
    check_header(path, separator, *names)
    table = _read_once(path, separator)
    return [table[name] for name in names]


def check_rows(path: str, separator: str) -> None:
    """Raise a ValueError for a cell that has swallowed rows; the file is read if it may have such a cell."""
    if may_swallow_rows(path):
        _read_once(path, separator)


def check_header(path: str, separator: str, *names: str) -> None:
    """Raise a ValueError for a column that a CSV file lacks, without reading its rows."""
    import pandas  # type: ignore[import-untyped]

    header = [str(column) for column in pandas.read_csv(path, sep=separator, nrows=0)]
    for name in names:
        if name not in header:
            is_within_another = any(name in column for column in header)  # all names may be one column
            hint = "; wrong --csv-separator?" if is_within_another else ""
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(header)}{hint}")


def _read_once(path: str, separator: str) -> Any:
    """The table of a CSV file, read again only where the file has changed."""
    if not os.path.exists(path):  # an address, whose changes are not known
        return _table(path, separator, None)
    status = os.stat(path)
    return _table(path, separator, (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=1)
def _table(path: str, separator: str, state: tuple[int, int] | None) -> Any:  # noqa: ARG001
    """The table of a file; its time and size are arguments by which the cache tells a changed file apart."""
    import pandas

    table = pandas.read_csv(path, sep=separator)
    if table.empty:
        raise ValueError(f"{path} has no rows")
    check_cells(table, path, separator)
    return table


def forget_files() -> None:
    """Free the memory of the file whose columns were read."""
    _table.cache_clear()
