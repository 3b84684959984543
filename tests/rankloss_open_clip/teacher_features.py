"""A teacher's features of the trainer's 64 pairs, and the student's model and features at a step of a run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from trainer_runs import SAMPLES, Run, Trainer

from rankloss_features.folder import NAMES


def unit_rows(rows: int, dimension: int, seed: int = 0) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


TEACHER = {name: unit_rows(SAMPLES, 7, seed) for seed, name in enumerate(NAMES)}


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


def student(trainer: Trainer, run: Run) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
    """The features of all pairs, by row, and the scale at the second and last step of a run."""
    clip, _ = resumed(trainer, run)
    with torch.no_grad():
        features = encoded(trainer, clip.eval())
    return dict(
        zip(NAMES, (x.double().numpy() for x in features), strict=True)
    ), clip.logit_scale.exp().item()
