"""Heads trained by CLIP's loss, then by a loss of graded lists, with or without a frozen model's scores."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from rankloss import RankedLists
from studies.lists.task import Part
from studies.lists.train import CLIP, SMOOTHING, further, listed
from studies.photographs import losses
from studies.photographs.heads import Heads

REFERENCE, BESIDE = " − reference", f" beside {CLIP}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data and the plan's budget."""

    arm: str  # CLIP, or a loss of lists, + REFERENCE, + BESIDE
    seed: int
    side: str  # "choice" or "test"
    lr: float
    worth: float = 1.0  # multiplies scores, those of the reference too
    weight: float = 1.0  # of the lists' term beside CLIP's


def changed(model: str, grades: Tensor) -> Tensor:
    """Return the grades as a model takes them: for Plackett–Luce those of 0 are unranked."""
    return grades.masked_fill(grades == 0, -math.inf) if model == "plackett_luce" else grades


def train(
    setting: Setting, part: Part, started: Heads, loss: RankedLists | None, *, epochs: int, size: int
) -> Heads:
    """Train heads further, and return them in evaluation mode.

    Args:
        setting: All that determines the training, beside the other arguments.
        part: The lists and pairs.
        started: The heads that every arm of a seed starts from; without dropout they are the reference.
        loss: Of lists; None: CLIP's loss alone.
        epochs: Of the lists.
        size: Lists of a batch.
    """
    has_clip = loss is None or setting.arm.endswith(BESIDE)
    contrast = losses.build(CLIP, label_smoothing=SMOOTHING) if has_clip else None
    model, _, _ = setting.arm.partition(" ")

    def term(heads: Heads, rows: Tensor, _: Tensor) -> Tensor:
        given = {}
        if REFERENCE in setting.arm:
            with torch.no_grad():
                v, t, _, places = listed(started, part, rows)
                scores = (started.log_scale.exp() * v @ t.T).gather(1, places["candidate_index"])
            given["reference_scores"] = setting.worth * scores
        v, t, grades, places = listed(heads, part, rows)
        scale = setting.worth * heads.log_scale.exp()
        return setting.weight * loss(v, t, changed(model, grades), scale, **places, **given)

    return further(setting, part, started, loss and term, contrast, epochs=epochs, size=size)
