"""The former home of :mod:`rankloss_trainers.catalog`, for packages that register a loss from here."""

from __future__ import annotations

from typing import Any

from rankloss_open_clip.command_line import gather_of
from rankloss_trainers.catalog import LossEntry, Option, count, weight

__all__ = ["LossEntry", "Option", "count", "layout", "weight"]


def layout(args: Any, *, rows: bool = True) -> dict[str, Any]:
    """How a term sees the batches of other processes, as a keyword that all losses of rankloss take.

    Args:
        args: The trainer's arguments.
        rows: Whether the term can be computed for a process's own rows alone.
    """
    return {"gather": gather_of(args, rows=rows)}
