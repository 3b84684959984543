"""What several studies train with: an optimizer and its decay, and files that are made once."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

CEILING = 100.0  # of a scale


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that decays matrices, but neither gains, biases nor scales."""
    every = list(parameters)
    return [
        {"params": [p for p in every if (p.dim() > 1) is decayed], "weight_decay": decay}
        for decayed, decay in ((True, weight_decay), (False, 0.0))
    ]


class Descent:
    """AdamW whose learning rate decays to 0 along a cosine.

    Args:
        log_scale: The logarithm of the similarities' scale, which stays between 1 and the ceiling.
        modules: What is trained.
        lr: The first learning rate.
        weight_decay: Of matrices.
        steps: Of the training.
        ceiling: Of the scale.
    """

    def __init__(
        self, log_scale: Tensor, modules: Iterable[nn.Module], *, lr: float, weight_decay: float, steps: int,
        ceiling: float = CEILING,
    ) -> None:  # fmt: skip
        groups = parameter_groups((p for module in modules for p in module.parameters()), weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.log_scale, self.largest = log_scale, math.log(ceiling)

    def step(self, loss: Tensor) -> None:
        """Make a step down a loss."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.decay.step()
        with torch.no_grad():
            self.log_scale.clamp_(0.0, self.largest)


def set_epoch(loss: nn.Module, epoch: int, epochs: int) -> None:
    """Tell every part of a loss that goes by epochs which one begins, from 1."""
    for part in loss.modules():
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch, epochs)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a file's content; what is not there is made by one process, and written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            partial = path.with_name(f".{path.name}.partial")
            torch.save(make(), partial)
            partial.replace(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found
