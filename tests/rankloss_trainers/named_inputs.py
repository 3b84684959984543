"""A batch with all inputs that a named loss takes, and a trainer that serves every loss."""

from __future__ import annotations

from typing import Any

import torch

from batches import unit
from rankloss.losses import TEACHER
from rankloss_trainers.host import NEEDS, Host
from registered import input_names

HOST = Host(
    name="a trainer",
    biased="--siglip",
    teacher="give the columns",
    progress="give callbacks=[Progress()]",
    serves=tuple(NEEDS),
)
N, D = 8, 6  # the pairs of the batch, and the width of its features
GRADES = [[2, 1, 0], [0, 0, 1], [1, 1, 0], [0, 2, 1], [3, 0, 0], [1, 0, 2], [0, 1, 0], [2, 2, 1]]
"""The grades of three candidates of each pair's query."""


def inputs_of(name: str, seed: int = 0) -> dict[str, Any]:
    """Features, the scale, and what the loss takes beside them; float64."""
    images = unit(N, D, seed=seed)
    known: dict[str, Any] = {
        "image_features": images,
        "text_features": unit(N, D, seed=seed + 1),
        "logit_scale": torch.tensor(6.0, dtype=torch.float64),
        "logit_bias": torch.tensor(-2.0, dtype=torch.float64),
        **{key: unit(N, D, seed=seed + 2 + i) for i, key in enumerate(TEACHER)},
        "pair_ids": torch.tensor([3, 1, 3, 2, 1, 3, 4, 5]),
        "caption_features": unit(N, D, seed=seed + 4),
        "query_features": images,
        "candidate_features": unit(N, 3, D, seed=seed + 5),
        "grades": torch.tensor(GRADES),
    }
    return {key: known[key] for key in input_names(name)}
