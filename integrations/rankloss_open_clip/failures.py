"""The modules of open_clip's trainer that could not be patched. Every ``import torch`` runs this file."""

from __future__ import annotations

failures: dict[str, Exception] = {}
"""Modules that were loaded but could not be patched, with the errors."""


def raise_failures() -> None:
    """Raise an ImportError if a module could not be patched."""
    for name, error in failures.items():
        raise ImportError(
            "--loss was given, but rankloss_open_clip could not attach to open_clip's trainer "
            f"({name}: {error!r}). Run `rankloss doctor` for advice, or leave --loss away."
        ) from error
