"""The training of a student: a loop as a user of the library writes it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from studies.data.features import Side
from studies.training import Descent, set_epoch

from . import losses
from .model import CROP, Student


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures with their captions."""

    student: Side  # uint8 [N, 64, 64, 3], and words' numbers [N, S, L], padded with 0
    teacher: Side  # unit-norm features of two encoders, [N, D] and [N, S, D']


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str  # of losses.NAMES
    seed: int
    side: str  # that is measured
    epochs: int = 20
    batch_size: int = 250
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    weight: float = 1.0  # of the added terms
    train_pictures: int = 6000


def crops(pictures: Tensor, generator: torch.Generator, size: int = CROP) -> Tensor:
    """Return a random crop of each picture, ``[N, size, size, 3]``, every second one mirrored on average."""
    n = len(pictures)
    corners = [torch.randint(side - size + 1, (n, 1), generator=generator) for side in pictures.shape[1:3]]
    rows, columns = (corner + torch.arange(size) for corner in corners)
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pictures[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(setting: Setting, pairs: Pairs, words: int) -> Student:
    """Train a student, and return it in evaluation mode.

    A seed gives every arm the same initial weights, batches, captions and crops.

    Raises:
        ValueError: If there are fewer pictures than the setting needs.
    """
    seen, teacher = pairs.student, pairs.teacher
    if not setting.batch_size <= setting.train_pictures <= len(seen.pictures):
        needed = f"{setting.batch_size} of a batch, {setting.train_pictures} in all"
        raise ValueError(f"train_pictures: {needed} are needed, got {len(seen.pictures)}")
    torch.manual_seed(setting.seed)
    drawing = torch.Generator().manual_seed(setting.seed)
    model = Student(words).train()
    loss = losses.build(setting.arm, weight=setting.weight, label_smoothing=setting.label_smoothing)
    steps = setting.train_pictures // setting.batch_size
    sizes = {"lr": setting.lr, "weight_decay": setting.weight_decay, "steps": setting.epochs * steps}
    descent = Descent(model.log_scale, [model, loss], **sizes)
    for epoch in range(1, setting.epochs + 1):
        set_epoch(loss, epoch, setting.epochs)
        shuffled = torch.randperm(setting.train_pictures, generator=drawing)
        for rows in shuffled.split(setting.batch_size)[:steps]:
            drawn = torch.randint(seen.sentences.shape[1], rows.shape, generator=drawing)
            v = model.pictures(crops(seen.pictures[rows], drawing))
            t = model.sentences(seen.sentences[rows, drawn])
            given = losses.references(setting.arm, (teacher.pictures[rows], teacher.sentences[rows, drawn]))
            descent.step(loss(v, t, model.log_scale.exp(), **given))
    return model.eval()
