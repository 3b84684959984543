"""The arms of students from scratch, their teachers, and their training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

import rankloss
from studies.data.features import Side
from studies.students.student import WIDTH, Student
from studies.students.train import fit
from studies.training import kept

from . import heads
from .cca import fitted, searched
from .setting import Setting

if TYPE_CHECKING:
    from .data import Encoded

TEACHER = ("reference_image_features", "reference_text_features")
_SPREAD = 0.3  # weight beside another term
_HEADS = Setting(
    "heads", seed=0, side="dev", batch_size=128, epochs=20, lr=1e-3, dropout=0.3
)  # the command's


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss of an arm's own number, and its teacher, of :func:`teacher`; empty: none."""

    loss: Callable[[float], nn.Module]
    teacher: str = ""


def spread(weight: float, base: nn.Module | None = None) -> nn.Module:
    """Return CLIP's loss, or another, with the spread of each modality."""
    return rankloss.SpreadLoss(base, weight=weight)


def soft_targets(weight: float, *, is_cross: bool = False) -> nn.Module:
    """Return CLIP's loss with a teacher's similarities as soft targets, as in the presets of encoders."""
    return rankloss.RankClipLoss(
        lambda_cross=weight if is_cross else 0.0,
        lambda_in=weight,
        schedule="constant",
        model="top_one",
        reference_scale=40.0,
        diagonal=False,
    )


def mimicry(weight: float, base: nn.Module | None = None) -> nn.Module:
    """Return CLIP's loss with the distance from the teacher's features."""
    return rankloss.MimicryLoss(base, weight=weight)


def ranks(weight: float, top_k: int = 8) -> nn.Module:
    """Return CLIP's loss with the teacher's best ranks, as ``rankclip-distill`` has it."""
    return rankloss.RankClipLoss(lambda_cross=weight, lambda_in=weight, top_k=top_k)


ARMS = {
    "clip": Arm(lambda _: rankloss.ClipLoss()),
    "smoothing": Arm(lambda value: rankloss.ClipLoss(label_smoothing=value)),
    "spread": Arm(spread),
    "encoders": Arm(lambda weight: spread(_SPREAD, soft_targets(weight)), "encoders"),
    "mimicry": Arm(mimicry, "cca"),
    "mimicry-shuffled": Arm(mimicry, "shuffled"),
    "mimicry-components": Arm(mimicry, "components"),
    "mimicry-heads": Arm(mimicry, "heads"),
    "mimicry-spread": Arm(lambda weight: spread(_SPREAD, mimicry(weight)), "cca"),
    "ranks": Arm(ranks, "cca"),
    "mimicry-ranks": Arm(lambda times: mimicry(16 * times, ranks(16 * times, top_k=4)), "cca"),
    "softmax": Arm(lambda weight: soft_targets(weight, is_cross=True), "cca"),
}


def train(setting: Setting, data: Encoded) -> Student:
    """Train a student, and return it in evaluation mode.

    A seed gives every arm the same initial weights, batches, captions and crops.
    """
    arm = ARMS[setting.arm]
    rows = teacher(arm.teacher, data) if arm.teacher else None
    torch.manual_seed(setting.seed)
    model = Student(data.words)

    def inputs(places: Tensor, drawn: Tensor) -> dict[str, Tensor]:
        if rows is None:
            return {}
        return dict(zip(TEACHER, (rows.pictures[places], rows.sentences[places, drawn]), strict=True))

    return fit(model, arm.loss(setting.value), setting, data.sides["train"], inputs)


def teacher(name: str, data: Encoded) -> Side:
    """Return a teacher's unit-norm features of the train side, all but the encoders' of the student's width.

    "encoders" are the two encoders, each in its own space; "cca" their regularised CCA, with the settings
    that are best on the dev side; "shuffled" the same, fitted on pictures with the captions of others;
    "components" each encoder's own principal components; "heads" trained heads, as the command has them.
    """
    train = data.encoded("train")
    if name == "encoders":
        return train

    def made() -> dict[str, Tensor]:
        of = _components(train) if name == "components" else _common(name, train, data)
        return {"pictures": _of_width(of.pictures), "sentences": _of_width(of.sentences)}

    found = kept(data.folder / f"teacher-{name}.pt", made)
    return Side(found["pictures"], found["sentences"])


def _common(name: str, train: Side, data: Encoded) -> Side:
    """Return the features of a teacher with a common space."""
    if name == "heads":
        model: heads.Part = heads.trained(_HEADS, train, _HEADS.seed)
    else:
        model, chosen = searched(data, most=WIDTH)
        if name == "shuffled":
            order = torch.randperm(len(train.pictures), generator=torch.Generator().manual_seed(0))
            model = fitted(Side(train.pictures, train.sentences[order]), chosen)
    return Side(model.pictures(train.pictures), model.sentences(train.sentences))


def _components(train: Side) -> Side:
    """Return the unit-norm coordinates along the first principal axes of each encoder's features."""

    def of(x: Tensor) -> Tensor:
        centred = (x - x.mean(0)).double()
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :WIDTH]
        return normalize(centred @ axes, dim=-1).float()

    sentences = of(train.sentences.flatten(0, 1)).unflatten(0, train.sentences.shape[:2])
    return Side(of(train.pictures), sentences)


def _of_width(features: Tensor) -> Tensor:
    """Return features of the student's width, the last coordinates 0."""
    return pad(features, (0, WIDTH - features.shape[-1]))
