"""The report of part 1, from its records."""

from __future__ import annotations

from pathlib import Path

from .plan import Find, Plan


def write(sizes: Plan, find: Find, folder: Path) -> Path:
    """Write the report and return its path."""
    raise NotImplementedError
