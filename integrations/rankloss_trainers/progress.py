"""The parts of a loss that are told where training stands, and the methods by which they are told."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

METHODS = {"epoch": "set_epoch", "step": "set_progress"}
"""The method of a part by the unit of its call: the beginning of an epoch, or of an optimizer step."""


def units_of(part: nn.Module) -> dict[str, Any]:
    """The methods of :data:`METHODS` that the class of a part has, by unit."""
    methods = {unit: getattr(type(part), name, None) for unit, name in METHODS.items()}
    return {unit: method for unit, method in methods.items() if callable(method)}


def listeners(loss: nn.Module, unit: str, preferred: str = "step") -> Iterator[Any]:
    """The methods by which the parts of a loss are told of the beginning of an epoch or step.

    Args:
        loss: The loss, or a module that holds it.
        unit: ``"epoch"`` or ``"step"``.
        preferred: The unit of a part that has both methods.
    """
    for part in loss.modules():
        methods = units_of(part)
        if unit in methods and (unit == preferred or len(methods) == 1):
            yield types.MethodType(methods[unit], part)
