"""The training of heads on features of frozen encoders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloss
from rankloss_features.folder import NAMES
from rankloss_features.heads import make_heads

_IMAGES, _TEXTS = NAMES
_FIRST_LOG_SCALE = 2.6593  # log(1 / 0.07), as CLIP begins
_LARGEST_LOG_SCALE = math.log(100)  # CLIP's ceiling
_WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Training:
    """The settings of a training.

    Attributes:
        epochs: Passes over the pairs.
        batch_size: Pairs of a step; all pairs if they are fewer.
        lr: The learning rate, which falls to 0 by a cosine.
        hidden: The width of a head's hidden layer.
        width: The width of the common space.
        seed: The seed of the weights, of dropout and of the order of the pairs.
        dropout: The share of units that drop out, before each layer of a head.
        label_smoothing: The label smoothing of CLIP's loss, in [0, 1).
        spread_weight: The weight of the spread of each modality beside CLIP's loss; 0 leaves it out.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3
    hidden: int = 512
    width: int = 256
    seed: int = 0
    dropout: float = 0.3
    label_smoothing: float = 0.0
    spread_weight: float = 0.0


def train(
    features: dict[str, Tensor], ids: Tensor | None, settings: Training
) -> tuple[nn.ModuleDict, float, list[float]]:
    """Train heads on features of pairs with CLIP's loss, and spread if it has a weight.

    Pairs of one id are no negatives of each other.

    Args:
        features: ``image_features`` and ``text_features``, ``[N, D']`` each.
        ids: ``[N]``, or None.
        settings: The settings.

    Returns:
        The heads, the scale, and the mean loss of each epoch.

    Raises:
        ValueError: Features are not finite, or one row N times; or the training diverges.
    """
    images, texts = features[_IMAGES], features[_TEXTS]
    criterion = _criterion(settings, has_ids=ids is not None)
    generator = torch.Generator().manual_seed(settings.seed)  # of the order of the pairs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # of the first weights and of dropout
        widths = {name: of_modality.shape[1] for name, of_modality in features.items()}
        heads = make_heads(widths, settings.hidden, settings.width, settings.dropout)
        for name, of_modality in features.items():
            head: Any = heads[name]
            head.standardise(name, of_modality)
        log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_SCALE))
        optimizer = _optimizer(heads, log_scale, settings.lr)
        batch_size = min(settings.batch_size, len(images))
        steps = len(images) // batch_size  # of an epoch; the pairs that are left over wait for the next one
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)

        def step(rows: Tensor) -> float:
            """Train a batch, and return its loss."""
            v = F.normalize(heads[_IMAGES](images[rows]), dim=-1)
            t = F.normalize(heads[_TEXTS](texts[rows]), dim=-1)
            ids_of_batch = {} if ids is None else {"pair_ids": ids[rows]}
            loss: Tensor = criterion(v, t, log_scale.exp(), **ids_of_batch)
            loss.backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            with torch.no_grad():
                log_scale.clamp_(0, _LARGEST_LOG_SCALE)
            return loss.item()

        mean_losses = []
        for epoch in range(1, settings.epochs + 1):
            sum_of_losses = 0.0
            order = torch.randperm(len(images), generator=generator)
            for rows in order.split(batch_size)[:steps]:
                sum_of_losses += step(rows)
                if log_scale.isnan():  # which the loss would refuse as bad input, at the next step
                    raise _divergence(epoch, settings)
            has_finite_weights = all(bool(weights.isfinite().all()) for weights in heads.parameters())
            if not (math.isfinite(sum_of_losses) and has_finite_weights):
                raise _divergence(epoch, settings)
            mean_losses.append(sum_of_losses / steps)
    return heads.eval(), float(log_scale.detach().exp()), mean_losses


def _optimizer(heads: nn.Module, log_scale: Tensor, lr: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices, but neither biases nor the scale, as CLIP's and the studies' do."""
    matrices = [weights for weights in heads.parameters() if weights.dim() > 1]
    others = [weights for weights in heads.parameters() if weights.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": [*others, log_scale], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def _criterion(settings: Training, *, has_ids: bool) -> nn.Module:
    """CLIP's loss, without pairs of one id as negatives, and spread if it has a weight."""
    clip = rankloss.ClipLoss(
        label_smoothing=settings.label_smoothing, same_id="ignore" if has_ids else None, gather=False
    )
    if settings.spread_weight <= 0:
        return clip
    return rankloss.SpreadLoss(clip, weight=settings.spread_weight, gather=False)


def _divergence(epoch: int, settings: Training) -> ValueError:
    """The error of a loss, a weight or a scale that is not finite."""
    others = f" or --spread-weight {settings.spread_weight:g}" if settings.spread_weight else ""
    return ValueError(f"the training diverged in epoch {epoch}: give less than --lr {settings.lr:g}{others}")
