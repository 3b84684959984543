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
from stored_features import features_folder

ROWS = 32
TAUGHT_LOSS = "rankclip-distill+mimicry"


def taught_options(**more: Any) -> dict[str, Any]:
    """The options of ``TAUGHT_LOSS``, by the name of each joined loss; more options are of the ranks."""
    ranks = {"schedule": "constant", "lambda_cross": 4.0, "lambda_in": 4.0, "top_k": 4, **more}
    return {"rankclip-distill": ranks, "mimicry": {"weight": 0.5}}


def teacher_features(width: int = 24, names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, Tensor]:
    """Unit-norm features ``[ROWS, width]`` of a teacher, drawn at random, by their names in a folder."""
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(ROWS, width, generator=generator), dim=-1) for name in names}


def write_teacher_folder(
    path: Path,
    dataset: Any,
    by_name: Mapping[str, Tensor],
    *,
    image_column: str,
    caption_column: str,
    spaces: str = "common",
) -> str:
    """Write a folder of these features of a dataset's pairs, and return its path."""
    pairs = Table(dataset, image_column, caption_column, data="given").pairs()
    names = [pair for block in pairs for pair in zip(block.pictures, block.captions, strict=True)]
    return features_folder(path, names, spaces, **{key: x.numpy() for key, x in by_name.items()})


def teacher_inputs(path: str, rows: Any) -> dict[str, Tensor]:
    """The folder's features of these rows, as a loss takes them."""
    arrays = Features(path).arrays
    names = dict(zip(NAMES, TEACHER, strict=True))
    return {names[name]: torch.from_numpy(x[rows].copy()) for name, x in arrays.items()}


def loss_of_plain_loop(path: str, width: int, **options: Any) -> Any:
    """``TAUGHT_LOSS`` for a plain loop, whose mimicry projects the folder's features to a model's width."""
    loss = rankloss_trainers.create(TAUGHT_LOSS, **taught_options(**options))
    (mimicry,) = (part for part in loss.modules() if isinstance(part, rankloss.MimicryLoss))
    mimicry.components = Features(path).components(width).matrix
    return loss
