"""The arms, and the training of a student: a loop as a user of the library writes it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import rankloss
from studies.data.features import Side
from studies.students.losses import TEACHER
from studies.students.model import SCALE
from studies.students.train import crops
from studies.training import Descent

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
    arm, n, size = ARMS[setting.arm], len(seen.pictures), setting.batch_size
    torch.manual_seed(setting.seed)
    drawing = torch.Generator().manual_seed(setting.seed)
    model, loss, steps = Student(words, arm.scale).train(), build(arm, n), n // size
    descent = Descent(
        model.log_scale, [model], lr=setting.lr, weight_decay=_WEIGHT_DECAY, steps=setting.epochs * steps
    )
    for epoch in range(1, setting.epochs + 1):
        if hasattr(loss, "set_epoch"):
            loss.set_epoch(epoch, setting.epochs)
        for rows in torch.randperm(n, generator=drawing).split(size)[:steps]:
            drawn = torch.randint(seen.sentences.shape[1], rows.shape, generator=drawing)
            v = model.pictures(crops(seen.pictures[rows], drawing, CROP))
            t = model.sentences(seen.sentences[rows, drawn])
            descent.step(loss(v, t, model.log_scale.exp(), **_given(arm, teachers, rows, drawn)))
    return model.eval()


def _given(arm: Arm, teachers: Teachers, rows: Tensor, drawn: Tensor) -> dict[str, Tensor]:
    given = {"rows": rows} if arm.loss == "memory" else {}
    images, texts = TEACHER
    if arm.images:
        given[images] = teachers.rows(arm.images)[rows]
    if arm.texts:
        given[texts] = teachers.rows(arm.texts)[rows, drawn]
    return given
