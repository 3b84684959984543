"""Where training stands, from a trainer's announcements to the losses that ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
    """Tells a loss where training stands.

    A trainer announces its epochs, and the calls of the loss are counted within each; or it announces every
    step. There is no other state, so a resumed run is where an uninterrupted one would be.

    Args:
        loss: The loss; each of its parts that has the method is told, see :func:`tell`.
        unit: ``"epoch"`` calls ``set_epoch``, ``"step"`` calls ``set_progress``.
    """

    def __init__(self, loss: nn.Module, unit: str) -> None:
        self.loss = loss
        self.unit = unit
        self._position: Position | None = None  # None where every step is announced
        self._calls = 0  # of the epoch
        self._step: int | None = None

    @property
    def started(self) -> bool:
        """Whether the trainer has announced an epoch or a step."""
        return self._step is not None

    def start_epoch(self, position: Position) -> None:
        """An epoch begins; its steps are counted from the calls."""
        self._position, self._calls, self._step = position, 0, 0
        if self.unit == "epoch":
            tell(self.loss, "set_epoch", position.epoch + 1, position.epochs)

    def start_step(self, step: int, total_steps: int) -> None:
        """Step ``step`` of ``total_steps`` begins, counted from 1; for trainers that announce each."""
        self._position, self._step = None, step - 1
        if self.unit == "step":
            tell(self.loss, "set_progress", step, total_steps)

    def advance(self) -> int:
        """Count a call of the loss, of which gradient accumulation makes several for a step.

        Returns:
            The optimizer step that it is for, counted from 0: of the epoch, or of the run where the trainer
            announces every step.

        Raises:
            RuntimeError: The trainer has announced nothing.
        """
        if self._step is None:
            raise RuntimeError(
                "call start_epoch() or start_step() first, as a trainer's plug-in does: the loss is not told "
                "where training stands"
            )
        position = self._position
        if position is None:
            return self._step
        self._step, call_of_step = divmod(self._calls, position.accum_freq)
        self._calls += 1
        if self.unit == "step" and call_of_step == 0:
            # An epoch that is longer than announced stays at its last step.
            step = position.epoch * position.steps + min(self._step, position.steps - 1)
            tell(self.loss, "set_progress", step + 1, position.epochs * position.steps)
        return self._step


def tell(loss: nn.Module, method: str, now: int, end: int) -> None:
    """Call ``set_epoch(epoch, epochs)`` or ``set_progress(step, total_steps)`` of every part that has it.

    A method of that name that cannot take the two numbers, or can do without the second, is another protocol
    (a sampler's ``set_epoch(epoch)``, say) and is left alone.
    """
    for told in listeners(loss, method):
        told(now, end)


def listeners(loss: nn.Module, method: str) -> list[Callable[[int, int], None]]:
    """The methods that :func:`tell` calls."""
    methods = [getattr(part, method, None) for part in loss.modules()]
    return [told for told in methods if callable(told) and _needs_two(told)]


def _needs_two(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    needed = [x for x in parameters if x.default is x.empty and x.kind is not x.VAR_KEYWORD]
    return len(needed) == 2 and all(x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD) for x in needed)
