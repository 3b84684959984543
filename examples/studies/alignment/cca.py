"""The closed form, as the library has it: searched on a dev side, fitted on the train side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from studies.data.features import Side

if TYPE_CHECKING:
    from .data import Encoded


def searched(data: Encoded, most: int = 384) -> tuple[Any, dict[str, float]]:
    """Return the closed form with the settings that are best on the dev side, and these."""
    raise NotImplementedError("the library does not have it yet")


def fitted(train: Side, chosen: dict[str, float]) -> Any:
    """Return the closed form of a train side, with settings."""
    raise NotImplementedError("the library does not have it yet")
