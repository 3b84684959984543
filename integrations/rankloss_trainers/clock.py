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


class Clock:
    """Tells a loss where training stands, for a trainer that announces its epochs and not its steps.

    The calls of the loss are counted within each epoch. There is no other state, so a resumed run is where an
    uninterrupted one would be.

    Args:
        loss: The loss; each of its parts that has the method is told, see :func:`tell`.
        unit: ``"epoch"`` calls ``set_epoch``, ``"step"`` calls ``set_progress``.
    """

    def __init__(self, loss: nn.Module, unit: str) -> None:
        self.loss = loss
        self.unit = unit
        self._position: Position | None = None
        self._calls = 0  # of the epoch

    @property
    def started(self) -> bool:
        """Whether the trainer has announced an epoch."""
        return self._position is not None

    def start_epoch(self, position: Position) -> None:
        """An epoch begins; its steps are counted from the calls."""
        self._position, self._calls = position, 0
        if self.unit == "epoch":
            tell(self.loss, "set_epoch", position.epoch + 1, position.epochs)

    def advance(self) -> int:
        """Count a call of the loss, of which gradient accumulation makes several for a step.

        Returns:
            The optimizer step of the epoch that it is for, counted from 0.

        Raises:
            RuntimeError: The trainer has announced nothing.
        """
        position = self._position
        if position is None:
            raise RuntimeError("call start_epoch() first: the loss is not told where training stands")
        step, call_of_step = divmod(self._calls, position.accum_freq)
        self._calls += 1
        if self.unit == "step" and call_of_step == 0:
            # An epoch that is longer than announced stays at its last step.
            of_run = position.epoch * position.steps + min(step, position.steps - 1)
            tell(self.loss, "set_progress", of_run + 1, position.epochs * position.steps)
        return step


def listeners(loss: nn.Module, method: str) -> list[Any]:
    """The methods ``set_epoch(epoch, epochs)`` or ``set_progress(step, total_steps)`` of a loss's parts."""
    return [getattr(part, method) for part in loss.modules() if hasattr(part, method)]


def tell(loss: nn.Module, method: str, now: int, end: int) -> None:
    """Call this method of every part of the loss that has it."""
    for told in listeners(loss, method):
        told(now, end)
