"""The parts of a loss that are told where training stands, the methods, and a training as text."""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from rankloss import schedules
from rankloss.losses import GatheringLoss

_logger = logging.getLogger("rankloss_trainers")

METHODS = {"epoch": "set_epoch", "step": "set_progress"}
"""The method of a part by the unit of its call: the beginning of an epoch, or of an optimizer step."""


def units_of(part: nn.Module) -> dict[str, Any]:
    """The methods of :data:`METHODS` by which the class of a part learns of progress, by unit.

    Those of :class:`rankloss.losses.GatheringLoss` are left out: they only pass it on to parts, which are
    told by themselves.
    """
    passing_on = [getattr(GatheringLoss, name) for name in METHODS.values()]
    methods = {}
    for unit, name in METHODS.items():
        method = getattr(type(part), name, None)
        if callable(method) and method not in passing_on:
            methods[unit] = method
    return methods


def listeners(loss: nn.Module, unit: str, preferred: str = "step") -> Iterator[Any]:
    """The methods by which the parts of a loss are told of the beginning of an epoch or step.

    Args:
        loss: The loss, or a module that holds it.
        unit: ``"epoch"`` or ``"step"``.
        preferred: The unit of a part that has both methods.
    """
    for part in loss.modules():
        methods = units_of(part)
        is_told_at_unit = unit in methods and (unit == preferred or len(methods) == 1)
        if is_told_at_unit:
            yield types.MethodType(methods[unit], part)


def end_training(parts: Iterable[nn.Module]) -> None:
    """Tell the parts that have a method ``end_training`` that the training they were told of has ended."""
    for part in parts:
        end = getattr(type(part), "end_training", None)
        if callable(end):
            end(part)


def course(loss: nn.Module, unit: str, lengths: Mapping[str, float]) -> str:
    """The schedules of a loss in a training, as text that a checkpoint keeps; empty if no part is told.

    Args:
        loss: The loss, or a module that holds it.
        unit: The unit of a part that has both methods.
        lengths: The length of the training by unit.

    Example:
        >>> import rankloss
        >>> course(rankloss.RankClipLoss(schedule="linear"), "step", {"step": 40})
        'linear per step over 40 step(s)'
    """
    texts = []
    for part in loss.modules():
        units = units_of(part)
        if not units:
            continue
        schedule = getattr(part, "schedule", None)
        text = getattr(schedule, "__name__", type(part).__name__)
        if schedule is not schedules.constant:
            unit_of_part = unit if unit in units else next(iter(units))
            text += f" per {unit_of_part} over {lengths[unit_of_part]:g} {unit_of_part}(s)"
        texts.append(text)
    return ", ".join(texts)


def one_line(loss: object) -> str:
    """A module, or a text about one, on one line and without addresses, which differ in every process.

    Example:
        >>> import rankloss
        >>> one_line(rankloss.SpreadLoss(weight=0.5))
        'SpreadLoss(weight=0.5 (base): ClipLoss())'
    """
    on_one_line = " ".join(str(loss).split())
    without_addresses = re.sub(r" at 0x[0-9a-fA-F]+", "", on_one_line)
    return without_addresses.replace("( ", "(").replace(" )", ")")


def warn_of_change(before: str | None, now: str) -> None:
    """Warn of a checkpoint of another training; None is one that does not say its training."""
    if before is not None and before != now:
        text = "The checkpoint was trained with %s; this run trains with %s"
        _logger.warning(text, before, now)
