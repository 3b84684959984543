"""What stands in for parts of the trainer, and what its model puts out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rankloss_open_clip.training import start_epoch
from rankloss_trainers.clock import Position


class Base(nn.Module):
    """A loss with the trainer's calling convention."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        value = self.scale * (image_features * text_features).sum() * logit_scale
        return {"contrastive_loss": value} if output_dict else value


def ready(args: Any) -> Any:
    """Arguments as the trainer completes them before it creates the loss."""
    args.rank, args.world_size, args.distill = 0, 1, False
    return args


def features(n: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(2, n, 5, generator=generator, dtype=torch.float64), dim=-1).float()
    scale = torch.tensor(8.0, requires_grad=True)
    image_features, text_features = (x.clone().requires_grad_() for x in rows)
    return {"image_features": image_features, "text_features": text_features, "logit_scale": scale}


def at(epoch: int, *, epochs: int = 3, steps: int = 4, accum_freq: int = 1) -> Position:
    return Position(epoch=epoch, epochs=epochs, steps=steps, accum_freq=accum_freq)


def epoch_begins(loss: nn.Module, epoch: int, args: Any, optimizer: Any = None, **data: Any) -> None:
    """What the patched ``train_one_epoch`` does before anything else; four batches an epoch."""
    train = SimpleNamespace(dataloader=SimpleNamespace(num_batches=4), **data)
    start_epoch(
        {"loss": loss, "epoch": epoch, "data": {"train": train}, "args": args, "optimizer": optimizer}
    )
