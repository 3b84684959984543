"""What open_clip's trainer makes of its command line."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip_train.params import parse_args
from torch import nn

from devices import DEVICE


def parsed(line: str) -> Any:
    """The trainer's arguments, with those that it adds itself: one process, no distillation."""
    args = parse_args(line.split())
    args.rank, args.world_size = 0, 1
    args.distill = False
    args.device = str(DEVICE)
    return args


def loss_of_the_trainer(line: str, epoch: int) -> nn.Module:
    """The loss, in one of twenty epochs, counted from 0."""
    loss: nn.Module = open_clip.create_loss(parsed(line))
    if "rankclip" in line:
        loss.start_epoch(epoch=epoch, epochs=20, steps=1, accum_freq=1)
    return loss
