"""Heads on frozen towers, and then the towers' upper parts with them: loops as a user writes them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
from studies.data.features import Side
from studies.spread.train import by_teacher, rankclip
from studies.students import heads
from studies.students.losses import TEACHER
from studies.training import Descent, set_epoch

from .activations import Activations

TOWERS, START = "towers", "start"  # teachers
_WEIGHT_DECAY = 0.05
_PART = 250  # pictures that are embedded at once


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str  # of ARMS
    seed: int
    side: str  # that is measured
    head_epochs: int  # of the heads, on frozen towers
    epochs: int = 0  # then of the towers' upper parts and the heads; 0: none
    depth: int = 1  # of the upper parts
    lr: float = 0.0  # of these epochs
    value: float = 0.0  # the arm's own number
    batch_size: int = 250


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss of an arm's own number, in the epochs that train the towers, and its teacher.

    Attributes:
        loss: Returns it.
        teacher: "towers": features of both before, each in its own space; "start": those of the trained
            heads, in one space; empty: none.
    """

    loss: Callable[[float], nn.Module]
    teacher: str = ""


ARMS = {
    "clip": Arm(lambda _: rankloss.ClipLoss()),
    "smoothing": Arm(lambda value: rankloss.ClipLoss(label_smoothing=value)),
    "spread": Arm(lambda value: rankloss.SpreadLoss(weight=value)),
    "rankclip": Arm(rankclip),
    "towers": Arm(by_teacher, TOWERS),
    "mimicry": Arm(lambda value: rankloss.MimicryLoss(weight=value), START),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """The beginning of a training.

    Attributes:
        frozen: Features of the side to train on, from the towers as they are: pooled, and of unit norm.
        activations: Of the side to train on, by depth.
        tails: Returns fresh upper parts by depth.
        heads: Returns those of a setting, trained on the frozen towers.
    """

    frozen: Side
    activations: Callable[[int], Activations]
    tails: Callable[[int], tuple[nn.Module, nn.Module]]
    heads: Callable[[Setting], OnFrozen]


@dataclasses.dataclass(frozen=True)
class OnFrozen:
    """Heads that were trained on frozen towers.

    Attributes:
        heads: In evaluation mode.
        features: That they were trained on, the pictures' standardised.
        mean: Of the pictures' features before, by dimension.
        std: Their deviation, likewise.
    """

    heads: heads.Heads
    features: Side
    mean: Tensor
    std: Tensor


def on_frozen(frozen: Side, seed: int, epochs: int, batch_size: int) -> OnFrozen:
    """Train heads on the features of frozen towers."""
    std, mean = torch.std_mean(frozen.pictures, dim=0)
    std = std.clamp(min=1e-6)
    features = Side((frozen.pictures - mean) / std, frozen.sentences)
    setting = heads.Setting(
        "clip", seed, "", epochs=epochs, batch_size=batch_size, train_pictures=len(frozen.pictures)
    )
    return OnFrozen(heads.train(setting, features), features, mean, std)


class Model(nn.Module):
    """The upper parts of two towers, and heads on them.

    The pictures' features are standardised by the mean and deviation of those before.
    """

    def __init__(
        self, tails: tuple[nn.Module, nn.Module], on: heads.Heads, mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.of_pictures, self.of_sentences = tails
        self.heads = on
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def pictures(self, maps: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, 256]``."""
        return self.heads.pictures((self.of_pictures(maps) - self.mean) / self.std)

    def sentences(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, 256]``."""
        return self.heads.sentences(normalize(self.of_sentences(tokens, there), dim=-1))

    @torch.inference_mode()
    def embed(self, side: Activations) -> Side:
        """Return the features of a side, ``[N, 256]`` and ``[N, S, 256]``."""
        n, each = side.ends.shape
        rows = torch.arange(n).repeat_interleave(each)
        drawn = torch.arange(each).repeat(n)
        v = [self.pictures(few.float()) for few in side.maps.split(_PART)]
        places = zip(rows.split(_PART), drawn.split(_PART), strict=True)
        t = [self.sentences(*side.of_sentences(*few)) for few in places]
        return Side(torch.cat(v), torch.cat(t).unflatten(0, (n, each)))


def train(setting: Setting, start: Start) -> Model:
    """Train the upper parts with the heads of frozen towers, and return the model in evaluation mode.

    A seed gives every arm the same heads, batches and sentences.
    """
    before = start.heads(setting)
    standardised, trained = before.features, copy.deepcopy(before.heads)
    n = len(standardised.pictures)
    model = Model(start.tails(setting.depth), trained, before.mean, before.std)
    if not setting.epochs:
        return model.eval()
    seen, steps = start.activations(setting.depth), n // setting.batch_size
    arm = ARMS[setting.arm]
    teacher = _teacher(arm.teacher, start.frozen, standardised, trained)
    loss = arm.loss(setting.value)
    torch.manual_seed(setting.seed)
    drawing = torch.Generator().manual_seed(setting.seed)
    model.train()
    descent = Descent(
        trained.log_scale, [model, loss], lr=setting.lr, weight_decay=_WEIGHT_DECAY,
        steps=setting.epochs * steps,
    )  # fmt: skip
    for epoch in range(1, setting.epochs + 1):
        set_epoch(loss, epoch, setting.epochs)
        for rows in torch.randperm(n, generator=drawing).split(setting.batch_size)[:steps]:
            drawn = torch.randint(seen.ends.shape[1], rows.shape, generator=drawing)
            v = model.pictures(seen.maps[rows].float())
            t = model.sentences(*seen.of_sentences(rows, drawn))
            descent.step(loss(v, t, trained.log_scale.exp(), **teacher(rows, drawn)))
    return model.eval()


def _teacher(
    name: str, frozen: Side, standardised: Side, trained: heads.Heads
) -> Callable[[Tensor, Tensor], Mapping[str, Tensor]]:
    """Return a function of a batch's pictures and sentences' numbers, to a loss's further arguments."""
    if not name:
        return lambda *_: {}
    if name == TOWERS:
        both = normalize(frozen.pictures, dim=-1), frozen.sentences
    else:
        before = copy.deepcopy(trained).eval()
        with torch.no_grad():
            both = before.pictures(standardised.pictures), before.sentences(standardised.sentences)
    return lambda rows, drawn: dict(zip(TEACHER, (both[0][rows], both[1][rows, drawn]), strict=True))
