"""Stand-ins for parts of the trainer, and for its model's output."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip_train.params import parse_args
from torch import Tensor, nn
from torch.nn.functional import normalize

from rankloss_open_clip import training


class LossOfTrainer(nn.Module):
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


def refusal_of_command(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line by which the trainer's parser refuses a command line."""
    with pytest.raises(SystemExit, match="2"):
        parse_args(list(argv))
    return capsys.readouterr().err.splitlines()[-1]


def completed_args(args: Any) -> Any:
    """Parsed arguments, completed as the trainer does before it creates the loss: one process, no teacher."""
    args.rank, args.world_size, args.distill = 0, 1, False
    return args


def random_features(n: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """The output of a model for n pairs: unit rows of width 5, and the scale, each with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(2, n, 5, generator=generator, dtype=torch.float64), dim=-1).float()
    scale = torch.tensor(8.0, requires_grad=True)
    image_features, text_features = (x.clone().requires_grad_() for x in rows)
    return {"image_features": image_features, "text_features": text_features, "logit_scale": scale}


def begin_epoch(loss: nn.Module, epoch: int, args: Any, optimizer: Any = None) -> None:
    """Call the patched ``train_one_epoch``, whose original does nothing; an epoch has four batches."""
    train = SimpleNamespace(dataloader=SimpleNamespace(num_batches=4))

    def train_one_epoch(loss: Any, epoch: int, data: Any, args: Any, optimizer: Any) -> None:
        pass

    bound = inspect.signature(train_one_epoch).bind(loss, epoch, {"train": train}, args, optimizer)
    training.train_one_epoch(train_one_epoch, bound)
