"""A run's second step in a loop of one's own: its model and optimizer, and the weights that it ends with."""

from __future__ import annotations

import re
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from trainer_runs import Run, Trainer

SETTING = [  # steps that are proportional to small gradients
    *("--epochs", "2", "--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)", "--skip-scheduler", "--wd", "0"),
    *("--lr", "0.01", "--beta1", "0.9", "--beta2", "0.98", "--eps", "0.001"),
]


def resumed(trainer: Trainer, run: Run) -> tuple[Any, torch.optim.Optimizer]:
    """The model and the optimizer of a run's first checkpoint."""
    checkpoint = torch.load(run.directory / "checkpoints/epoch_1.pt", map_location="cpu", weights_only=True)
    clip = open_clip.create_model(f"local-dir:{trainer.directory / 'tiny'}")
    clip.load_state_dict({k.removeprefix("module."): x for k, x in checkpoint["state_dict"].items()})
    named = list(clip.named_parameters())
    small = [p for name, p in named if p.ndim < 2 or re.search("bn|ln|bias|logit_scale", name)]
    groups = [{"params": small}, {"params": [p for _, p in named if all(p is not x for x in small)]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return clip, optimizer


def encoded(trainer: Trainer, clip: Any) -> tuple[Tensor, Tensor]:
    """Unit-norm features of all pictures and their captions."""
    transform: Any = open_clip.image_transform(32, is_train=False)
    images = torch.stack([transform(Image.open(row[0])) for row in trainer.rows])
    tokens = open_clip.get_tokenizer(f"local-dir:{trainer.directory / 'tiny'}")([x[1] for x in trainer.rows])
    return clip.encode_image(images, normalize=True), clip.encode_text(tokens, normalize=True)


def assert_equal_weights(run: Run, expected: dict[str, Tensor]) -> None:
    """The run's second epoch ended with these weights, and moved them."""
    found, before = run.epoch(2), run.epoch(1)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert (found["text_projection"] - before["text_projection"]).abs().max() > 1e-3
