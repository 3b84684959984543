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
from studies.training import CEILING, Descent

from . import losses

HIDDEN, WIDTH = 512, 256
Seen = Callable[["Heads", Tensor, Tensor], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside the features."""

    loss: str  # of losses.NAMES
    seed: int
    side: str  # the split that is measured
    epochs: int = 40
    batch_size: int = 500
    lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.3
    label_smoothing: float = 0.0
    scale_start: float = 14.3  # or the ceiling, where that is lower
    scale_ceiling: float = CEILING
    scale_fixed: bool = False  # the scale stays at its start
    train_pictures: int = 6000

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.train_pictures:
            raise ValueError(f"batch_size: must be from 1 to {self.train_pictures}, got {self.batch_size}")
        if not (self.scale_start >= 1 and self.scale_ceiling >= 1):
            bounds = f"scale_start {self.scale_start} and scale_ceiling {self.scale_ceiling}"
            raise ValueError(f"scale_start, scale_ceiling: must be at least 1, got {bounds}")

    @property
    def arm(self) -> str:
        """The loss, which names a record."""
        return self.loss

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch; pictures that fill no batch are left out of it."""
        return self.train_pictures // self.batch_size


class Heads(nn.Module):
    """A head for each modality, and the scale of the similarities."""

    def __init__(self, train: Side, setting: Setting, *, times: int = 1) -> None:
        super().__init__()
        self.of_pictures = _head(train.pictures.shape[-1], setting.dropout, times)
        self.of_sentences = _head(train.sentences.shape[-1], setting.dropout, times)
        start = math.log(min(setting.scale_start, setting.scale_ceiling))
        self.log_scale = nn.Parameter(torch.tensor(start), requires_grad=not setting.scale_fixed)

    def pictures(self, features: Tensor) -> Tensor:
        """Return unit-norm features in the common space, from an encoder's features."""
        return normalize(self.of_pictures(features), dim=-1)

    def sentences(self, features: Tensor) -> Tensor:
        """Return unit-norm features in the common space, from an encoder's features."""
        return normalize(self.of_sentences(features), dim=-1)


def _head(width: int, dropout: float, times: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(width, times * HIDDEN),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(times * HIDDEN, times * WIDTH),
    )


def train(
    setting: Setting, train: Side, *, times: int = 1, loss: nn.Module | None = None,
    seen: Seen = lambda *_: {},
) -> Heads:  # fmt: skip
    """Train two heads, and return them in evaluation mode.

    A seed gives every loss the same initial weights, batches, sentences and units that drop out.

    Args:
        setting: All that determines the training, beside the other arguments.
        train: The features.
        times: A factor of the heads' widths.
        loss: None: the setting's own, by its name. Its parameters learn, too.
        seen: Further arguments of the loss, from the heads, a batch's pictures and their sentences' numbers.

    Raises:
        ValueError: If there are fewer pictures than the setting needs.
    """
    if len(train.pictures) < setting.train_pictures:
        raise ValueError(f"train_pictures: {setting.train_pictures} of {len(train.pictures)} are needed")
    torch.manual_seed(setting.seed)
    order = torch.Generator().manual_seed(setting.seed)
    model = Heads(train, setting, times=times).train()
    loss = loss or losses.build(setting.loss, label_smoothing=setting.label_smoothing)
    sizes = {"lr": setting.lr, "weight_decay": setting.weight_decay, "ceiling": setting.scale_ceiling}
    descent = Descent(model.log_scale, [model, loss], steps=setting.epochs * setting.steps, **sizes)
    for epoch in range(1, setting.epochs + 1):
        for part in loss.modules():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch, setting.epochs)
        shuffled = torch.randperm(setting.train_pictures, generator=order)
        for rows in shuffled.split(setting.batch_size)[: setting.steps]:
            drawn = torch.randint(train.sentences.shape[1], rows.shape, generator=order)
            v = model.pictures(train.pictures[rows])
            t = model.sentences(train.sentences[rows, drawn])
            descent.step(loss(v, t, model.log_scale.exp(), **seen(model, rows, drawn)))
    return model.eval()
