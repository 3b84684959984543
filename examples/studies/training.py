"""What several studies train with: the optimizer's parameters, and files that are made once."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that decays matrices, but neither gains, biases nor scales."""
    every = list(parameters)
    return [
        {"params": [p for p in every if (p.dim() > 1) is decayed], "weight_decay": decay}
        for decayed, decay in ((True, weight_decay), (False, 0.0))
    ]


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a file's content; what is not there is made and written, whole or not at all."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        torch.save(make(), partial)
        partial.replace(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found
