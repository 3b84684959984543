"""The methods that make heads from features of pairs: in closed form, trained, and both side by side.

Settings and weights are chosen on pairs that are cut from those to learn from.
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

    With ``both``, the weight of the closed form is chosen by heads that are trained without the pairs that
    were cut; then other heads are trained on all pairs. Where there are too few pairs to cut some, it is 1.

    Args:
        asked: The heads that are asked for.
        pairs: The pairs to learn from.

    Raises:
        ValueError: The features cannot be aligned, or are not finite; or the training diverges.
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
    parts = _with_shares(parts, asked.keep, pairs)
    return Made(parts, joined(parts), scale, losses, closed, chosen)


def _tuned(pairs: Pairs, seed: int) -> Tuned:
    """The fit of the closed form to pairs, with the search for its setting."""

    def take(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        taken = pairs.take(rows).features
        return taken[_IMAGES], taken[_TEXTS]

    return tuned(take, pairs.pictures, pairs.groups, seed=seed)


def _trained(asked: Asked, pairs: Pairs) -> tuple[list[Part], float, list[float]]:
    """As many trained heads as are asked for, each of share 1; the scale and the losses of the first."""
    ids = torch.from_numpy(pairs.groups)
    runs = []
    for number in range(asked.count):
        settings = dataclasses.replace(asked.training, seed=asked.training.seed + number)
        runs.append(train(pairs.features, ids, settings))
    _, scale_of_first, losses_of_first = runs[0]
    return [Part.trained(heads, share=1.0) for heads, _, _ in runs], scale_of_first, losses_of_first


def _choice(asked: Asked, pairs: Pairs, closed: Tuned) -> tuple[float, dict[str, float]]:
    """Choose the weight of the closed form beside trained heads on the pairs that were cut.

    Args:
        asked: The heads that are asked for.
        pairs: All pairs to learn from.
        closed: The closed form; its ``is_held_out`` tells the pairs that were cut.

    Returns:
        The weight with the best R@10 on the pairs that were cut, and R@10 of each method there.
    """
    heads, _, _ = _trained(asked, pairs.take(~closed.is_held_out))
    cut = pairs.take(closed.is_held_out)

    def recall_of_parts(*parts: Part) -> float:
        return recall_of(joined(_with_shares(parts, keep=0.0, pairs=cut)), cut)

    recall_with_weight = {}
    for weight in WEIGHTS:
        # A part's share of the similarity is in proportion to the square of its features' weight.
        closed_part = Part.closed(closed.of_learned, weight**2)
        recall_with_weight[weight] = recall_of_parts(closed_part, *heads)
    best = max(WEIGHTS, key=recall_with_weight.__getitem__)
    return best, {
        CCA: recall_of_parts(Part.closed(closed.of_learned, share=1.0)),
        TRAINED: recall_of_parts(*heads),
        BOTH: recall_with_weight[best],
        "weight": best,
    }


def _with_shares(parts: Sequence[Part], keep: float, pairs: Pairs) -> list[Part]:
    """The parts, with the encoders' own features if these are kept, whose shares add up to 1.

    Args:
        parts: The parts that were made. Their shares may have any sum; the ratios between them stay.
        keep: The share of the encoders' own features. Above 0 they are one part more, the last.
        pairs: Any pairs: their features have the widths of the encoders.
    """
    sum_of_shares = sum(part.share for part in parts)
    with_shares = [dataclasses.replace(part, share=(1 - keep) * part.share / sum_of_shares) for part in parts]
    if keep > 0:
        widths = {name: features.shape[1] for name, features in pairs.features.items()}
        with_shares.append(Part.own(widths, keep))
    return with_shares


@torch.no_grad()
def recall_of(modules: nn.ModuleDict, pairs: Pairs) -> float:
    """R@10 of heads on pairs, in [0, 1], the mean of both directions.

    Rows of one picture are several texts and one image, which is ranked once; an image and a text of one
    group are partners. With fewer than ten images or texts, k is their number.

    Args:
        modules: The heads, by ``image_features`` and ``text_features``.
        pairs: The pairs.
    """
    # The images are those of each picture's first row, in the order of the rows.
    _, first_row_of_picture = np.unique(pairs.pictures, return_index=True)
    image_rows = torch.from_numpy(np.sort(first_row_of_picture))
    image_features = unit_rows(modules[_IMAGES](pairs.features[_IMAGES][image_rows]))
    text_features = unit_rows(modules[_TEXTS](pairs.features[_TEXTS]))
    text_ids = torch.from_numpy(pairs.groups)
    image_ids = text_ids[image_rows]
    k = min(10, len(image_features), len(text_features))
    recalls = recall(image_features, text_features, k, image_ids=image_ids, text_ids=text_ids)
    return float((recalls[f"image_to_text_R@{k}"] + recalls[f"text_to_image_R@{k}"]) / 2)


def setting_in_words(cca: CanonicalCorrelation) -> str:
    """The setting of a fit, and the number of its dimensions, in words for the log."""
    setting = cca.setting
    root = ", of roots" if setting.root else ""
    return (
        f"ridges {setting.image_ridge:g} and {setting.text_ridge:g}, {len(cca.correlations)} dimensions, "
        f"power {setting.power:g}{root}"
    )
