"""The methods that make heads from features of pairs: in closed form, trained, and both side by side.

Whatever has to be chosen, is chosen on pairs that are cut from those to learn from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankloss.metrics import recall
from rankloss.precision import unit_rows
from rankloss_features.cca import CanonicalCorrelation
from rankloss_features.folder import NAMES
from rankloss_features.heads import BOTH, CCA, TRAINED, Part, joined
from rankloss_features.heads_training import Training, train
from rankloss_features.tuning import Tuned, tuned

DEFAULT = BOTH
"""The method of ``rankloss heads`` without ``--method``: the study of docs/evidence.md chose it."""

WEIGHTS = (1.0, 0.5, 0.7, 1.4, 2.0)
"""Tried weights of the closed form's features beside those of each trained head."""

SCALE = 1 / 0.07  # CLIP's at the start of its training, of heads that have no scale of their own
_IMAGES, _TEXTS = NAMES


class Pairs(NamedTuple):
    """Pairs to learn from.

    Attributes:
        features: ``image_features`` and ``text_features``, unit-norm, ``[N, D']`` each.
        pictures: ``[N]``, a number of each row's picture.
        groups: ``[N]``, a number of each row's id; its picture's without ids.
    """

    features: dict[str, Tensor]
    pictures: NDArray[np.int64]
    groups: NDArray[np.int64]

    def take(self, rows: NDArray[Any]) -> Pairs:
        """Some of the pairs, by a mask or by their numbers."""
        index = torch.from_numpy(rows)
        features = {name: x[index] for name, x in self.features.items()}
        return Pairs(features, self.pictures[rows], self.groups[rows])


@dataclass(frozen=True)
class Asked:
    """The heads that are asked for.

    Attributes:
        method: One of :data:`rankloss_features.heads.METHODS`.
        training: The settings of the trained heads.
        count: The number of trained heads that are joined, each with a seed of its own.
        keep: The share of the encoders' own similarity, in [0, 1); it needs a common space.
    """

    method: str = DEFAULT
    training: Training = Training()
    count: int = 1
    keep: float = 0.0


class Made(NamedTuple):
    """Heads, and the course of their making.

    Attributes:
        parts: The parts, with their shares.
        modules: The heads, by ``image_features`` and ``text_features``.
        scale: The multiplier of the similarities.
        losses: The mean loss of each epoch of the first trained head.
        tuned: The fit of the closed form, with its search; None without it.
        chosen: R@10 of each method on the pairs that were cut for the choice, and the weight that is best.
    """

    parts: list[Part]
    modules: nn.ModuleDict
    scale: float
    losses: list[float]
    tuned: Tuned | None
    chosen: dict[str, float]


def make(asked: Asked, pairs: Pairs) -> Made:
    """Make heads.

    With ``both``, heads that are trained without the pairs that were cut choose the weight; then all pairs
    train others.

    Raises:
        ValueError: The features cannot be aligned, or are not finite.
    """
    closed = None if asked.method == TRAINED else _tuned(pairs, asked.training.seed)
    weight = 1.0
    chosen: dict[str, float] = {}
    if closed is not None and closed.trials:  # without trials no pairs were cut
        if asked.method == BOTH:
            weight, chosen = _choice(asked, pairs, closed)
        else:
            chosen = {CCA: closed.trials[0].recall}
    parts: list[Part] = []
    losses: list[float] = []
    scale = SCALE
    if closed is not None:
        parts.append(Part.closed(closed.cca, weight**2))
    if asked.method != CCA:
        trained, scale, losses = _trained(asked, pairs)
        parts += trained
    shared_parts, modules = _shared(parts, asked.keep, pairs)
    return Made(shared_parts, modules, scale, losses, closed, chosen)


def _tuned(pairs: Pairs, seed: int) -> Tuned:
    """The closed form, with its search."""

    def take(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        taken = pairs.take(rows).features
        return taken[_IMAGES], taken[_TEXTS]

    return tuned(take, pairs.pictures, pairs.groups, seed=seed)


def _trained(asked: Asked, pairs: Pairs) -> tuple[list[Part], float, list[float]]:
    """Trained heads, with the scale and the losses of the first."""
    ids = torch.from_numpy(pairs.groups)
    runs = []
    for number in range(asked.count):
        settings = dataclasses.replace(asked.training, seed=asked.training.seed + number)
        runs.append(train(pairs.features, ids, settings))
    _, scale_of_first, losses_of_first = runs[0]
    return [Part.trained(heads, share=1.0) for heads, _, _ in runs], scale_of_first, losses_of_first


def _choice(asked: Asked, pairs: Pairs, closed: Tuned) -> tuple[float, dict[str, float]]:
    """The weight of the closed form that is best on the pairs that were cut; R@10 of each method there."""
    heads, _, _ = _trained(asked, pairs.take(~closed.is_held_out))
    cut = pairs.take(closed.is_held_out)

    def score(parts: Sequence[Part]) -> float:
        _, modules = _shared(parts, 0.0, cut)
        return recall_of(modules, cut)

    # A part's share of the similarity is in proportion to the square of its features' weight.
    scores = {weight: score([Part.closed(closed.of_learned, weight**2), *heads]) for weight in WEIGHTS}
    best = max(WEIGHTS, key=lambda weight: scores[weight])
    return best, {
        CCA: score([Part.closed(closed.of_learned, 1.0)]),
        TRAINED: score(heads),
        BOTH: scores[best],
        "weight": best,
    }


def _shared(parts: Sequence[Part], keep: float, pairs: Pairs) -> tuple[list[Part], nn.ModuleDict]:
    """The parts with shares that add up to 1, and the heads that they make.

    Args:
        parts: The parts, whose shares are in proportion.
        keep: The share of the encoders' own features, which become a part of their own above 0.
        pairs: Pairs, for the width of these features.
    """
    widths = {name: x.shape[1] for name, x in pairs.features.items()}
    total = sum(part.share for part in parts)
    shared = [dataclasses.replace(part, share=(1 - keep) * part.share / total) for part in parts]
    if keep > 0:
        shared.append(Part.own(widths, keep))
    return shared, joined(shared)


@torch.no_grad()
def recall_of(modules: nn.ModuleDict, pairs: Pairs) -> float:
    """R@10 of heads on pairs, the mean of both directions, each picture once."""
    _, first_rows = np.unique(pairs.pictures, return_index=True)
    rows = torch.from_numpy(np.sort(first_rows))
    groups = torch.from_numpy(pairs.groups)
    images = unit_rows(modules[_IMAGES](pairs.features[_IMAGES][rows]))
    texts = unit_rows(modules[_TEXTS](pairs.features[_TEXTS]))
    k = min(10, len(images), len(texts))
    recalls = recall(images, texts, k, image_ids=groups[rows], text_ids=groups)
    return float((recalls[f"image_to_text_R@{k}"] + recalls[f"text_to_image_R@{k}"]) / 2)


def closed_form(cca: CanonicalCorrelation) -> str:
    """A setting in words, for the log."""
    setting = cca.setting
    root = ", of roots" if setting.root else ""
    return (
        f"ridges {setting.image_ridge:g} and {setting.text_ridge:g}, {len(cca.correlations)} dimensions, "
        f"power {setting.power:g}{root}"
    )
