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
    """Random rows of unit norm, float32."""
    features = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


TEACHER_FEATURES = {name: unit_rows(SAMPLES, 7, seed) for seed, name in enumerate(NAMES)}


def model_after_first_epoch(trainer: Trainer, run: Run) -> tuple[Any, torch.optim.Optimizer]:
    """The model and the optimizer of a run's first checkpoint, as the trainer would resume them."""
    checkpoint = torch.load(run.directory / "checkpoints/epoch_1.pt", map_location="cpu", weights_only=True)
    clip = open_clip.create_model(f"local-dir:{trainer.directory / 'tiny'}")
    weights = {name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()}
    clip.load_state_dict(weights)
    without_decay, with_decay = [], []
    for name, parameter in clip.named_parameters():  # in the trainer's groups, and in its order
        is_named_so = re.search("bn|ln|bias|logit_scale", name) is not None
        (without_decay if parameter.ndim < 2 or is_named_so else with_decay).append(parameter)
    groups = [{"params": without_decay}, {"params": with_decay}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return clip, optimizer


def features_of_all_pairs(trainer: Trainer, clip: Any) -> tuple[Tensor, Tensor]:
    """A model's unit-norm features of all pictures, and of their captions."""
    transform: Any = open_clip.image_transform(32, is_train=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{trainer.directory / 'tiny'}")
    images = torch.stack([transform(Image.open(picture)) for picture, _, _ in trainer.rows])
    tokens = tokenize([title for _, title, _ in trainer.rows])
    return clip.encode_image(images, normalize=True), clip.encode_text(tokens, normalize=True)


def student_before_last_step(trainer: Trainer, run: Run) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
    """The features of all pairs, by row, and the scale, of which a run of two steps makes its second one."""
    clip, _ = model_after_first_epoch(trainer, run)
    with torch.no_grad():
        images, texts = features_of_all_pairs(trainer, clip.eval())
    features = {"image_features": images.double().numpy(), "text_features": texts.double().numpy()}
    return features, clip.logit_scale.exp().item()
