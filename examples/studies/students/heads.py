"""Two heads on frozen features, and their training: a loop as a user of the library writes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from studies.data.features import Side
from studies.training import Descent, set_epoch

from . import losses

HIDDEN, WIDTH = 512, 256
_SCALE = 14.3  # at the start
Seen = Callable[[Tensor, Tensor], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside the features."""

    arm: str  # of losses.NAMES
    seed: int
    side: str  # the split that is measured
    epochs: int = 40
    batch_size: int = 500
    lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.3
    label_smoothing: float = 0.0
    weight: float = 1.0  # of the added terms
    same_id: str = ""  # what is done with pairs of one id; empty: nothing
    train_pictures: int = 6000

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.train_pictures:
            raise ValueError(f"batch_size: must be from 1 to {self.train_pictures}, got {self.batch_size}")

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch; pictures that fill no batch are left out of it."""
        return self.train_pictures // self.batch_size


class Heads(nn.Module):
    """A head for each modality, and the scale of the similarities."""

    def __init__(self, train: Side, setting: Setting) -> None:
        super().__init__()
        self.of_pictures = _head(train.pictures.shape[-1], setting.dropout)
        self.of_sentences = _head(train.sentences.shape[-1], setting.dropout)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))

    def pictures(self, features: Tensor) -> Tensor:
        """Return unit-norm features in the common space, from an encoder's features."""
        return normalize(self.of_pictures(features), dim=-1)

    def sentences(self, features: Tensor) -> Tensor:
        """Return unit-norm features in the common space, from an encoder's features."""
        return normalize(self.of_sentences(features), dim=-1)


def _head(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(width, HIDDEN),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, WIDTH),
    )


def train(
    setting: Setting, train: Side, *, loss: nn.Module | None = None, seen: Seen = lambda *_: {}
) -> Heads:
    """Train two heads, and return them in evaluation mode.

    A seed gives every loss the same initial weights, batches, sentences and units that drop out.

    Args:
        setting: All that determines the training, beside the other arguments.
        train: The features.
        loss: None: the setting's own, by its name. Its parameters learn, too.
        seen: Further arguments of the loss, from a batch's pictures and their sentences' numbers.

    Raises:
        ValueError: If there are fewer pictures than the setting needs.
    """
    if len(train.pictures) < setting.train_pictures:
        raise ValueError(f"train_pictures: {setting.train_pictures} of {len(train.pictures)} are needed")
    torch.manual_seed(setting.seed)
    order = torch.Generator().manual_seed(setting.seed)
    model = Heads(train, setting).train()
    names = ("weight", "label_smoothing", "same_id")
    loss = loss or losses.build(setting.arm, **{name: getattr(setting, name) for name in names})
    sizes = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    descent = Descent(model.log_scale, [model, loss], steps=setting.epochs * setting.steps, **sizes)
    for epoch in range(1, setting.epochs + 1):
        set_epoch(loss, epoch, setting.epochs)
        shuffled = torch.randperm(setting.train_pictures, generator=order)
        for rows in shuffled.split(setting.batch_size)[: setting.steps]:
            drawn = torch.randint(train.sentences.shape[1], rows.shape, generator=order)
            v = model.pictures(train.pictures[rows])
            t = model.sentences(train.sentences[rows, drawn])
            descent.step(loss(v, t, model.log_scale.exp(), **seen(rows, drawn)))
    return model.eval()
