"""A small CLIP pretrained on the old data, and fine-tuned on the new in the ways that are compared."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr
from openmoji_demo.metrics import retrieval
from torch import Tensor

import rankloss
from rankloss_trainers import create
from studies.training import parameter_groups

from .task import CONTEXT, Pairs, Part

_MODEL = Path(__file__).resolve().parents[1] / "miniature/models/resnet/open_clip_config.json"
_BATCH, _WARMUP, _LARGEST_SCALE = 128, 0.1, 100.0
_PRETRAINING_LR = 1e-3


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a fine-tuning, beside its data."""

    arm: str
    seed: int
    side: str  # "choice" or "test"
    pretraining: int  # epochs on the old data
    epochs: int  # on the new; 0 leaves the starting checkpoint as it is
    lr: float = 0.0
    loss: str = "clip"
    weight: float = 0.0  # of the loss's own terms
    share: float = 1.0  # of the fine-tuned weights in the result, the rest is the starting checkpoint's


def build(seed: int) -> open_clip.CLIP:
    """Return the miniature's ResNet with this seed's initial weights."""
    config = json.loads(_MODEL.read_text(encoding="utf-8"))["model_cfg"]
    config["text_cfg"]["context_length"] = CONTEXT
    torch.manual_seed(seed)
    return open_clip.CLIP(**config)


def pretrain(seed: int, epochs: int, old: Pairs) -> open_clip.CLIP:
    """Train on the old data by CLIP's loss."""
    model = build(seed).train()
    _optimise(model, old, rankloss.ClipLoss(), epochs=epochs, lr=_PRETRAINING_LR, seed=seed)
    return model.eval()


def fine_tune(setting: Setting, start: open_clip.CLIP, new: Pairs) -> open_clip.CLIP:
    """Fine-tune a copy of the starting checkpoint, and return it in evaluation mode.

    A loss with a teacher gets the starting checkpoint's own features of the new pairs. Batch normalisation
    keeps its statistics of the old data.
    """
    model = copy.deepcopy(start)
    if setting.epochs:
        teacher = None if setting.loss == "clip" else features(start, new)
        sizes = {"epochs": setting.epochs, "lr": setting.lr, "seed": setting.seed}
        _optimise(model, new, _loss(setting), teacher, **sizes)
    if setting.share < 1:
        with torch.no_grad():
            for before, after in zip(start.parameters(), model.parameters(), strict=True):
                after.copy_(before.lerp(after, setting.share))
    return model


def _loss(setting: Setting) -> torch.nn.Module:
    """Return the loss that ``--loss`` builds in a trainer."""
    w = setting.weight
    if setting.loss == "clip":
        return rankloss.ClipLoss()
    if setting.loss == "mimicry":
        return create("mimicry", weight=w)
    return create(setting.loss, lambda_cross=w, lambda_in=w, schedule="constant")


def _optimise(
    model: open_clip.CLIP,
    pairs: Pairs,
    loss: torch.nn.Module,
    teacher: tuple[Tensor, Tensor] | None = None,
    *,
    epochs: int,
    lr: float,
    seed: int,
) -> None:
    """Train as open_clip's trainer does: AdamW without decay of gains and biases, warmup, cosine decay."""
    groups = parameter_groups(model.parameters(), 0.1)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = epochs * (len(pairs.pictures) // _BATCH)
    schedule = cosine_lr(optimizer, lr, int(_WARMUP * steps), steps)
    for step, (rows, columns) in enumerate(_batches(pairs, epochs, seed)):
        schedule(step)
        given = {}
        if teacher is not None:
            given["reference_image_features"] = teacher[0][rows]
            given["reference_text_features"] = teacher[1][rows, columns]
        images, texts, scale = model(_floats(pairs.pictures[rows]), pairs.captions[rows, columns])
        optimizer.zero_grad()
        loss(images, texts, scale, **given).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(_LARGEST_SCALE))


def _batches(pairs: Pairs, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows in random order, and one of each row's captions, so that a seed gives every arm the same."""
    drawing = torch.Generator().manual_seed(seed)
    n, captions = pairs.captions.shape[:2]
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=drawing).split(_BATCH):
            columns = torch.randint(captions, rows.shape, generator=drawing)
            if len(rows) == _BATCH:
                yield rows, columns


def _floats(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def features(model: open_clip.CLIP, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return unit-norm features of the pictures, ``[N, D]``, and of their captions, ``[N, K, D]``."""
    images = [model.encode_image(_floats(x), normalize=True) for x in pairs.pictures.split(256)]
    texts = [model.encode_text(x, normalize=True) for x in pairs.captions.flatten(0, 1).split(256)]
    return torch.cat(images), torch.cat(texts).unflatten(0, pairs.captions.shape[:2])


def measure(model: open_clip.CLIP, part: Part) -> dict[str, float]:
    """Return R@10 of held-out pairs, mean of both directions, in percent: kept, learned, and their mean."""

    def found(pairs: Pairs) -> float:
        images, texts = features(model, pairs)
        return sum(of[10] for of in retrieval(images, texts[:, 0], ks=(10,)).values()) / 2

    kept, learned = found(part.old_held_out), found(part.new_held_out)
    return {"kept": kept, "learned": learned, "mean": (kept + learned) / 2}
