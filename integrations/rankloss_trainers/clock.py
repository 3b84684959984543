"""Where training stands, from a trainer's announcements to the losses that ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Position:
    """Where a trainer stands at the start of an epoch.

    Attributes:
        epoch: The epoch that begins, counted from 0.
        epochs: Epochs of the whole run.
        steps: Optimizer steps per epoch.
        accum_freq: Calls of the loss per step.
    """

    epoch: int
    epochs: int
    steps: int
    accum_freq: int


def listeners(loss: nn.Module, method: str) -> list[Any]:
    """The methods ``set_epoch(epoch, epochs)`` or ``set_progress(step, total_steps)`` of a loss's parts."""
    return [getattr(part, method) for part in loss.modules() if hasattr(part, method)]


def tell(loss: nn.Module, method: str, now: int, end: int) -> None:
    """Call this method of every part of the loss that has it."""
    for told in listeners(loss, method):
        told(now, end)
