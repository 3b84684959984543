"""What a loss checks of the weights of its terms."""

from __future__ import annotations

import math

__all__ = ["check_weight"]


def check_weight(name: str, value: float) -> float:
    """``value``, or a ValueError that names the argument unless it is finite and at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return value
