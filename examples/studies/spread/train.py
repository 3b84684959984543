"""The arms, and the training of the captions' student with each of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankloss
from studies.captions.student import Student
from studies.captions.teachers import Teachers
from studies.captions.train import fit, taught
from studies.data.features import Side
from studies.students.losses import TEACHER
from studies.students.model import SCALE
from studies.training import CEILING

from .terms import SameTowerLoss, WithinModalities

WEIGHT = 0.3  # of the spread beside another term
_TEACHER_SCALE = 40.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str  # of ARMS
    seed: int
    side: str  # that is measured
    batch_size: int
    epochs: int
    lr: float
    value: float  # the arm's own number
    split: int = 0  # other ones hold out other concepts


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss of an arm's own number, and its teachers.

    Attributes:
        loss: Returns it.
        images: The pictures' teacher, a name of :meth:`.Teachers.rows`; empty: none.
        texts: The texts' teacher, likewise.
        is_joined: Both teachers are one: their rows side by side.
        scale: Returns that of the similarities at the start, given the arm's own number.
        is_scale_fixed: It stays there.
        ceiling: Of the scale.
    """

    loss: Callable[[float], nn.Module]
    images: str = ""
    texts: str = ""
    is_joined: bool = False
    scale: Callable[[float], float] = lambda _: SCALE
    is_scale_fixed: bool = False
    ceiling: float = CEILING


def spread(weight: float, base: nn.Module | None = None) -> nn.Module:
    """Return the form of the spread that the dev sides chose, as the library has it."""
    return rankloss.SpreadLoss(base, weight=weight)


def rankclip(weight: float, *, is_cross: bool = True, is_in: bool = True) -> nn.Module:
    """Return RankCLIP, λ times ``weight``; or one of its terms."""
    return rankloss.RankClipLoss(lambda_cross=weight * is_cross, lambda_in=weight * is_in)


def by_teacher(weight: float, *, is_cross: bool = False) -> nn.Module:
    """Return CLIP's loss with a teacher's similarities as soft targets, as in the presets of encoders."""
    return rankloss.RankClipLoss(
        lambda_cross=weight if is_cross else 0.0, lambda_in=weight, schedule="constant", model="top_one",
        reference_scale=_TEACHER_SCALE, diagonal=False,
    )  # fmt: skip


def _form(name: str, *, is_scale_constant: bool = False) -> Callable[[float], nn.Module]:
    return lambda weight: WithinModalities(name, weight, is_scale_constant=is_scale_constant)


_ENCODERS = {"images": "efficientnet", "texts": "minilm"}
ARMS = {
    "clip": Arm(lambda _: rankloss.ClipLoss()),
    "smoothing": Arm(lambda value: rankloss.ClipLoss(label_smoothing=value)),
    "scale": Arm(lambda _: rankloss.ClipLoss(), scale=float),
    "std": Arm(_form("std")),
    "std-constant": Arm(spread),
    "variance": Arm(_form("variance")),
    "variance-constant": Arm(_form("variance", is_scale_constant=True)),
    "log-mean-exp": Arm(_form("log-mean-exp")),
    "log-mean-exp-constant": Arm(_form("log-mean-exp", is_scale_constant=True)),
    "rankclip": Arm(rankclip),
    "rankclip-spread": Arm(lambda weight: spread(WEIGHT, rankclip(weight))),
    "encoders": Arm(by_teacher, **_ENCODERS),
    "encoders-shuffled": Arm(by_teacher, "shuffled efficientnet", "shuffled minilm"),
    "encoders-spread": Arm(lambda weight: spread(WEIGHT, by_teacher(weight)), **_ENCODERS),
    "captions": Arm(by_teacher, texts="tf-idf"),
    "captions-shuffled": Arm(by_teacher, texts="shuffled tf-idf"),
    "rankclip-cross": Arm(lambda weight: rankclip(weight, is_in=False)),
    "rankclip-in": Arm(lambda weight: rankclip(weight, is_cross=False)),
    "uniform": Arm(_form("uniform")),
    "one-hot": Arm(_form("one-hot")),
    "same-tower": Arm(SameTowerLoss),
    "one-space": Arm(lambda weight: by_teacher(weight, is_cross=True), **_ENCODERS, is_joined=True),
    "clip-fixed": Arm(lambda _: rankloss.ClipLoss(), scale=float, is_scale_fixed=True),
    "spread-fixed": Arm(lambda _: spread(WEIGHT), scale=float, is_scale_fixed=True),
    "spread-unbounded": Arm(spread, ceiling=math.inf),
    "rankclip-fixed": Arm(lambda _: rankclip(1.0), scale=float, is_scale_fixed=True),
}


def train(setting: Setting, seen: Side, teachers: Teachers, words: int) -> Student:
    """Train a student, and return it in evaluation mode; the arguments are those of the captions' training.

    A seed gives every arm the same initial weights, batches, captions and crops.
    """
    arm = ARMS[setting.arm]
    torch.manual_seed(setting.seed)
    model = Student(words, arm.scale(setting.value))
    model.log_scale.requires_grad_(not arm.is_scale_fixed)

    def inputs(rows: Tensor, drawn: Tensor) -> dict[str, Tensor]:
        found = taught(arm.images, arm.texts, teachers, rows, drawn)
        if arm.is_joined:
            joined = torch.cat([found[name] for name in TEACHER], dim=-1) / 2**0.5
            return dict.fromkeys(TEACHER, joined)
        return found

    return fit(model, arm.loss(setting.value), setting, seen, inputs, ceiling=arm.ceiling)
