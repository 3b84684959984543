"""The ways to learn from a teacher that ranking is compared with, from the formulas of their papers.

V and T are the student's unit-norm features of N pairs, V' and T' the teacher's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # the features of the images, and of the texts
Scales = tuple[Tensor | float, Tensor | float]  # of the student's similarities, s, and of the teacher's, s'


def mimicry(student: Pair, teacher: Pair) -> Tensor:
    """Feature mimicry (CLIP-KD): ``mean_i ‖v_i − v'_i‖² + mean_i ‖t_i − t'_i‖²``."""
    return sum_of((x - y).square().sum(-1).mean() for x, y in zip(student, teacher, strict=True))


def contrast(student: Pair, teacher: Pair, scale: Tensor | float) -> Tensor:
    """Interactive contrastive learning (CLIP-KD): CLIP's loss of each student tower with the teacher's other.

    ``½[CE_k(scale·V·T'ᵀ) + CE_k(scale·T·V'ᵀ)]``, k the row's own number.
    """
    own = torch.arange(len(student[0]), device=student[0].device)
    crossed = zip(student, reversed(teacher), strict=True)
    return sum_of(F.cross_entropy(scale * x @ y.T, own) for x, y in crossed) / 2


def relation(student: Pair, teacher: Pair, scales: Scales) -> Tensor:
    """Contrastive relation distillation (CLIP-KD; the distillation loss of open_clip's trainer).

    The cross-entropy H of softmax rows: ``½[H(s'·V'·T'ᵀ, s·V·Tᵀ) + H(s'·T'·V'ᵀ, s·T·Vᵀ)]``.
    """
    return sum_of(soft_cross_entropy(*pair) for pair in _cross_modal(student, teacher, scales)) / 2


def softmax(student: Pair, teacher: Pair, scales: Scales) -> Tensor:
    """:func:`relation`, and the same of the two matrices within a modality, without their diagonals."""
    return relation(student, teacher, scales) + softmax_within(student, teacher, scales)


def softmax_within(student: Pair, teacher: Pair, scales: Scales) -> Tensor:
    """``½[H(s'·V'·V'ᵀ, s·V·Vᵀ) + H(s'·T'·T'ᵀ, s·T·Tᵀ)]``, the matrices without their diagonals."""
    return sum_of(soft_cross_entropy(*pair) for pair in _within(student, teacher, scales)) / 2


def pearson(student: Pair, teacher: Pair, scales: Scales) -> Tensor:
    """Row-wise Pearson distance (DIST): one minus the correlation of softmax rows, the mean of both ways."""
    return sum_of(pearson_distance(*pair) for pair in _cross_modal(student, teacher, scales)) / 2


def pearson_within(student: Pair, teacher: Pair, scales: Scales) -> Tensor:
    """:func:`pearson` of the two matrices within a modality, without their diagonals."""
    return sum_of(pearson_distance(*pair) for pair in _within(student, teacher, scales)) / 2


def pearson_distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """One minus the correlation of the rows' softmax, the mean over rows."""
    rows = (x.softmax(-1) for x in (mine, theirs))
    return 1 - F.cosine_similarity(*(x - x.mean(-1, keepdim=True) for x in rows), dim=-1).mean()


def distances(student: Pair, teacher: Pair) -> Tensor:
    """Relational distances (RKD): Huber's loss of the distances within a modality, each over their mean."""

    def relative(x: Tensor) -> Tensor:
        found = torch.pdist(x)
        return found / found.mean()

    return sum_of(F.huber_loss(relative(x), relative(y)) for x, y in zip(student, teacher, strict=True))


def soft_cross_entropy(mine: Tensor, theirs: Tensor) -> Tensor:
    """The mean over rows of the cross-entropy from the softmax of the teacher's to that of the student's."""
    return F.cross_entropy(mine, theirs.softmax(-1))


def sum_of(terms: Any) -> Tensor:
    """The sum of at least one term."""
    return torch.stack(list(terms)).sum()


def _cross_modal(student: Pair, teacher: Pair, scales: Scales) -> list[tuple[Tensor, Tensor]]:
    """The logits of both, images in the rows and then texts in the rows."""
    mine, theirs = (s * v @ t.T for s, (v, t) in zip(scales, (student, teacher), strict=True))
    return [(mine, theirs), (mine.T, theirs.T)]


def _within(student: Pair, teacher: Pair, scales: Scales) -> list[tuple[Tensor, Tensor]]:
    """The logits of both within each modality, without their diagonals."""
    both = (
        [s * off_diagonal(x @ x.T) for s, x in zip(scales, of, strict=True)]
        for of in zip(student, teacher, strict=True)
    )
    return [(mine, theirs) for mine, theirs in both]


def off_diagonal(x: Tensor) -> Tensor:
    """A square matrix without its diagonal, ``[N, N − 1]``."""
    return x[~torch.eye(len(x), dtype=torch.bool, device=x.device)].view(len(x), -1)


_ROWS = 2**16  # that are read at a time


def principal_components(
    images: npt.NDArray[Any], texts: npt.NDArray[Any], width: int
) -> npt.NDArray[np.float64]:
    """``[D', width]`` of features ``[M, D']``: the directions in which those of both modalities are largest.

    About the origin, not about a mean: of all projections to this width the one that keeps their products
    best. Both modalities share it, so that an image and a text can still be compared.

    Raises:
        ValueError: If the features have fewer numbers than ``width``.
    """
    if images.shape[1] < width:
        raise ValueError(f"the teacher's features have {images.shape[1]} numbers, fewer than {width}")
    products = np.zeros((images.shape[1],) * 2)
    for x in (images, texts):
        for start in range(0, len(x), _ROWS):
            part = x[start : start + _ROWS].astype(np.float64)
            products += part.T @ part
    _, vectors = np.linalg.eigh(products)  # in ascending order
    return np.ascontiguousarray(vectors[:, ::-1][:, :width])
