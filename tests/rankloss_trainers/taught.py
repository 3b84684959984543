"""A teacher wider than the tiny models: its folder, and a plain loop's loss that learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rankloss
import rankloss_trainers
from rankloss.losses import TEACHER
from rankloss_features import Features
from rankloss_features.data import Table
from rankloss_features.folder import NAMES
from stored_features import stored

ROWS = 32
LOSS = "rankclip-distill+mimicry"


def taught_options(**more: Any) -> dict[str, Any]:
    ranks = {"schedule": "constant", "lambda_cross": 4.0, "lambda_in": 4.0, "top_k": 4, **more}
    return {"rankclip-distill": ranks, "mimicry": {"weight": 0.5}}


def features(width: int = 24, names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(ROWS, width, generator=generator), dim=-1) for name in names}


def folder(
    path: Path,
    dataset: Any,
    features: Mapping[str, Tensor],
    image: str,
    caption: str,
    spaces: str = "common",
) -> str:
    """A folder of these features of a dataset's pairs."""
    pairs = Table(dataset, image, caption, data="given").pairs()
    names = [pair for block in pairs for pair in zip(block.pictures, block.captions, strict=True)]
    return stored(path, names, spaces, **{key: x.numpy() for key, x in features.items()})


def references(path: str, rows: Any) -> dict[str, Tensor]:
    """The folder's features of these rows, as a loss takes them."""
    arrays = Features(path).arrays
    names = dict(zip(NAMES, TEACHER, strict=True))
    return {names[name]: torch.from_numpy(x[rows].copy()) for name, x in arrays.items()}


def criterion(path: str, width: int, **options: Any) -> Any:
    """The loss of a plain loop, for a model of this width."""
    loss = rankloss_trainers.create(LOSS, **taught_options(**options))
    (part,) = (x for x in loss.modules() if isinstance(x, rankloss.MimicryLoss))
    part.components = Features(path).components(width).matrix
    return loss
