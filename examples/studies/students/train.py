"""The training of a student: a loop as a user of the library writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from studies.data.features import Side
from studies.training import CEILING, Descent, set_epoch

from .student import CROP, Student

_WEIGHT_DECAY = 0.05


class Steps(Protocol):
    """The part of a setting that the loop reads."""

    seed: int
    batch_size: int
    epochs: int
    lr: float


def crops(pictures: Tensor, generator: torch.Generator, size: int = CROP) -> Tensor:
    """Return a random crop of each picture, ``[N, size, size, 3]``, every second one mirrored on average."""
    n = len(pictures)
    corners = [torch.randint(side - size + 1, (n, 1), generator=generator) for side in pictures.shape[1:3]]
    rows, columns = (corner + torch.arange(size) for corner in corners)
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pictures[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def fit(
    model: Student,
    loss: nn.Module,
    setting: Steps,
    seen: Side,
    inputs: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    *,
    ceiling: float = CEILING,
) -> Student:
    """Train a student, and return it in evaluation mode.

    Args:
        model: Of the initial weights.
        loss: Of features and scale.
        setting: Its seed draws the batches, captions and crops.
        seen: Pictures, and their captions as words' numbers.
        inputs: Further arguments of the loss, from a batch's pictures and their captions' numbers.
        ceiling: Of the similarities' scale.
    """
    n, size = len(seen.pictures), setting.batch_size
    drawing, steps = torch.Generator().manual_seed(setting.seed), n // size
    model.train()
    sizes = {"lr": setting.lr, "weight_decay": _WEIGHT_DECAY, "steps": setting.epochs * steps}
    descent = Descent(model.log_scale, [model], ceiling=ceiling, **sizes)
    for epoch in range(1, setting.epochs + 1):
        set_epoch(loss, epoch, setting.epochs)
        for rows in torch.randperm(n, generator=drawing).split(size)[:steps]:
            drawn = torch.randint(seen.sentences.shape[1], rows.shape, generator=drawing)
            v = model.pictures(crops(seen.pictures[rows], drawing, CROP))
            t = model.sentences(seen.sentences[rows, drawn])
            descent.step(loss(v, t, model.log_scale.exp(), **inputs(rows, drawn)))
    return model.eval()
