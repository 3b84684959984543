"""The weights of a loss's terms: checked numbers, which are read while a module is built."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["FixedWeights", "as_number", "check_weight"]


def check_weight(name: str, value: float) -> float:
    """``value`` as a float, or a ValueError that names the argument unless it is finite and at least 0."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a number and takes no gradient; got a tensor that requires one")
    number = as_number(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return number


def as_number(value: Any) -> float:
    """``value`` as a float; NaN for what is not a number."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # the last for a meta tensor
        return math.nan


class FixedWeights:
    """A module with weights that are read while it is built: setting one later raises an error."""

    _fixed: ClassVar[frozenset[str]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            raise AttributeError(
                f"{name} cannot be changed once {type(self).__name__} is built; build another"
            )
        super().__setattr__(name, value)
