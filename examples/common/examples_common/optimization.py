"""The optimizer's parameters."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that decays matrices, but neither gains, biases nor scales."""
    every = list(parameters)
    return [
        {"params": [p for p in every if (p.dim() > 1) is decayed], "weight_decay": decay}
        for decayed, decay in ((True, weight_decay), (False, 0.0))
    ]
