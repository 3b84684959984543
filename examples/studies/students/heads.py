"""Two heads on frozen features, and their training: a loop as a user of the library writes it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
from studies.data.features import Side
from studies.training import Descent

HIDDEN, WIDTH = 512, 256
_SCALE = 14.3  # at the start
_WEIGHT_DECAY = 0.05


@dataclasses.dataclass(frozen=True)
class Training:
    """All that determines a training, beside the features."""

    seed: int
    epochs: int
    batch_size: int
    lr: float
    dropout: float
    label_smoothing: float


class Heads(nn.Module):
    """A head for each modality, and the scale of the similarities."""

    def __init__(self, train: Side, dropout: float) -> None:
        super().__init__()
        self.of_pictures = _head(train.pictures.shape[-1], dropout)
        self.of_sentences = _head(train.sentences.shape[-1], dropout)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))

    def pictures(self, features: Tensor) -> Tensor:
        """Return unit-norm features in the common space, from an encoder's features."""
        return normalize(self.of_pictures(features), dim=-1)

    def sentences(self, features: Tensor) -> Tensor:
        """Return unit-norm features in the common space, from an encoder's features."""
        return normalize(self.of_sentences(features), dim=-1)


def _head(width: int, dropout: float) -> nn.Sequential:
    """Return a head with one hidden layer, from an encoder's width into the common space."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(width, HIDDEN),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, WIDTH),
    )


def train(of: Training, train: Side) -> Heads:
    """Train two heads with CLIP's loss, and return them in evaluation mode.

    Args:
        of: All that determines the training, beside the features.
        train: The features; pictures that fill no batch are left out of an epoch.

    Raises:
        ValueError: If there are fewer pictures than a batch.
    """
    n = len(train.pictures)
    if not 1 <= of.batch_size <= n:
        raise ValueError(f"batch_size: must be from 1 to {n}, got {of.batch_size}")
    torch.manual_seed(of.seed)
    order = torch.Generator().manual_seed(of.seed)
    model, steps = Heads(train, of.dropout).train(), n // of.batch_size
    loss = rankloss.ClipLoss(label_smoothing=of.label_smoothing)
    sizes = {"lr": of.lr, "weight_decay": _WEIGHT_DECAY, "steps": of.epochs * steps}
    descent = Descent(model.log_scale, [model], **sizes)
    for _ in range(of.epochs):
        for rows in torch.randperm(n, generator=order).split(of.batch_size)[:steps]:
            drawn = torch.randint(train.sentences.shape[1], rows.shape, generator=order)
            v = model.pictures(train.pictures[rows])
            t = model.sentences(train.sentences[rows, drawn])
            descent.step(loss(v, t, model.log_scale.exp()))
    return model.eval()
