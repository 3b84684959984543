"""The arms, and the training of a student: a loop as a user of the library writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

import rankloss
from studies.data.features import Side
from studies.students.losses import TEACHER
from studies.students.model import SCALE
from studies.students.train import crops
from studies.training import CEILING, Descent, set_epoch

from .memory import MemoryLoss
from .student import CROP, Student
from .teachers import Teachers

_SCALE = 40.0  # of a teacher's similarities
_WEIGHT_DECAY = 0.05


@dataclasses.dataclass(frozen=True)
class Arm:
    """CLIP's loss, and what an arm adds to it.

    Attributes:
        texts: The texts' teacher, a name of :meth:`.Teachers.rows`.
        images: The pictures' teacher, likewise.
        weight: λ of the teacher's term.
        loss: "softmax", "ranks" or "mimicry", of a teacher; "rankclip", "smoothing" or "memory", without one.
        scale: Of the student's similarities, at the start.
    """

    texts: str = ""
    images: str = ""
    weight: float = 4.0
    loss: str = "softmax"
    scale: float = SCALE


ARMS = {
    "clip": Arm(loss="clip"),
    "smoothing": Arm(loss="smoothing"),
    "scale-5": Arm(loss="clip", scale=5.0),
    "scale-50": Arm(loss="clip", scale=50.0),
    "rankclip": Arm(loss="rankclip"),
    "memory": Arm(loss="memory"),
    "captions": Arm("tf-idf"),
    "shuffled": Arm("shuffled tf-idf"),
    "lsa": Arm("lsa"),
    "ranks": Arm("tf-idf", weight=16.0, loss="ranks"),
    "sentence": Arm("minilm"),
    "mimicry": Arm("clip's texts", "clip's pictures", loss="mimicry"),
    "encoders": Arm("minilm", "efficientnet", weight=16.0),
    "encoders-captions": Arm("minilm+tf-idf", "efficientnet", weight=16.0),
    "thumbnails": Arm("", "thumbnails"),
    "thumbnails-captions": Arm("tf-idf", "thumbnails"),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str  # of ARMS
    seed: int
    side: str  # that is measured
    batch_size: int
    epochs: int
    lr: float
    split: int = 0  # other ones hold out other concepts


class Steps(Protocol):
    """The part of a setting that the loop reads."""

    seed: int
    batch_size: int
    epochs: int
    lr: float


def build(arm: Arm, pairs: int) -> nn.Module:
    """Return an arm's loss on a data set of so many pairs."""
    if arm.loss == "memory":
        return MemoryLoss(pairs)
    if arm.loss == "smoothing":
        return rankloss.ClipLoss(label_smoothing=0.1)
    base = rankloss.ClipLoss()
    if arm.loss == "clip":
        return base
    if arm.loss == "mimicry":
        return rankloss.MimicryLoss(base)
    if arm.loss == "rankclip":
        return rankloss.RankClipLoss(base)
    if arm.loss == "ranks":
        return rankloss.RankClipLoss(base, lambda_cross=0.0, lambda_in=arm.weight, top_k=16)
    return rankloss.RankClipLoss(
        base, lambda_cross=0.0, lambda_in=arm.weight, schedule="constant", model="top_one",
        reference_scale=_SCALE, diagonal=False,
    )  # fmt: skip


def train(setting: Setting, seen: Side, teachers: Teachers, words: int) -> Student:
    """Train a student, and return it in evaluation mode.

    A seed gives every arm the same initial weights, batches, captions and crops.

    Args:
        setting: All that determines the training, beside the other arguments.
        seen: Pictures, and their captions as words' numbers.
        teachers: The teachers' rows of the same pairs.
        words: Numbers of words.
    """
    arm = ARMS[setting.arm]
    torch.manual_seed(setting.seed)
    model, loss = Student(words, arm.scale), build(arm, len(seen.pictures))
    return fit(model, loss, setting, seen, lambda *places: _given(arm, teachers, *places))


def fit(
    model: Student,
    loss: nn.Module,
    setting: Steps,
    seen: Side,
    inputs: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    *,
    ceiling: float = CEILING,
) -> Student:
    """Train a student, and return it in evaluation mode.

    Args:
        model: Of the initial weights.
        loss: Of features and scale.
        setting: Its seed draws the batches, captions and crops.
        seen: Pictures, and their captions as words' numbers.
        inputs: Further arguments of the loss, from a batch's pictures and their captions' numbers.
        ceiling: Of the similarities' scale.
    """
    n, size = len(seen.pictures), setting.batch_size
    drawing, steps = torch.Generator().manual_seed(setting.seed), n // size
    model.train()
    sizes = {"lr": setting.lr, "weight_decay": _WEIGHT_DECAY, "steps": setting.epochs * steps}
    descent = Descent(model.log_scale, [model], ceiling=ceiling, **sizes)
    for epoch in range(1, setting.epochs + 1):
        set_epoch(loss, epoch, setting.epochs)
        for rows in torch.randperm(n, generator=drawing).split(size)[:steps]:
            drawn = torch.randint(seen.sentences.shape[1], rows.shape, generator=drawing)
            v = model.pictures(crops(seen.pictures[rows], drawing, CROP))
            t = model.sentences(seen.sentences[rows, drawn])
            descent.step(loss(v, t, model.log_scale.exp(), **inputs(rows, drawn)))
    return model.eval()


def taught(images: str, texts: str, teachers: Teachers, rows: Tensor, drawn: Tensor) -> dict[str, Tensor]:
    """Return the teachers' rows of a batch by the names of a loss's arguments; an empty name has none."""
    found = {}
    if images:
        found[TEACHER[0]] = teachers.rows(images)[rows]
    if texts:
        found[TEACHER[1]] = teachers.rows(texts)[rows, drawn]
    return found


def _given(arm: Arm, teachers: Teachers, rows: Tensor, drawn: Tensor) -> dict[str, Tensor]:
    memory = {"rows": rows} if arm.loss == "memory" else {}
    return {**memory, **taught(arm.images, arm.texts, teachers, rows, drawn)}
