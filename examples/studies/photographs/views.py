"""Views: the part of the teacher that a user has, as a batch of a training sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from studies.distillation import off_diagonal

from . import heads
from .features import Side
from .heads import Heads, Seen
from .teacher import Teacher

LEVELS = 16
RERANKED = 50  # pictures of a batch whose lists are seen: a whole list costs twenty sentences
_SEED = 0  # of the orthogonal matrices


@dataclasses.dataclass(frozen=True)
class Setting(heads.Setting):
    """All that determines a training, beside the features and the teacher."""

    view: str = ""  # one of NAMES
    weight: float = 0.0  # of the added term; of ranks of features, what multiplies λ
    top_k: int = 0  # the best ranks that count; 0: all
    scale: float = 0.0  # of the teacher's similarities
    mimicry: float = 0.0  # weight of mimicry beside ranks

    @property
    def arm(self) -> str:
        """The view and the loss."""
        return f"{self.view} {self.loss}".strip()


def matrices(v: Tensor, t: Tensor) -> list[Tensor]:
    """Return V·Tᵀ, its transpose, V·Vᵀ and T·Tᵀ, the last two without their diagonals."""
    cross = v @ t.T
    return [cross, cross.T, off_diagonal(v @ v.T), off_diagonal(t @ t.T)]


def quantised(x: Tensor, span: tuple[float, float]) -> Tensor:
    """Return numbers rounded to the nearest of 16 levels over a span; those outside get its ends.

    Example:
        >>> quantised(torch.tensor([-2.0, 0.0, 0.04, 1.0]), (-0.5, 1.0))
        tensor([-0.5000,  0.0000,  0.0000,  1.0000])
    """
    low, high = span
    step = (high - low) / (LEVELS - 1)
    return low + step * ((x - low) / step).round().clamp(0, LEVELS - 1)


def _sharpened(x: Tensor, _: object) -> Tensor:
    return (20 * (x - 1)).exp()


def _saturated(x: Tensor, _: object) -> Tensor:
    return (4 * x).tanh()


# Of float64 cosines, so that two of float32 that differ still do, and of the train side's span.
MAPS: dict[str, Callable[[Tensor, tuple[float, float]], Tensor]] = {
    "scores": lambda x, _: x,
    "sharpened": _sharpened,
    "saturated": _saturated,
    "4 bits": quantised,
}
NAMES = ("", "features", *MAPS, "ten ids", "separate", "reranker", "reranker with scores")


def of(name: str, teacher: Teacher, student: Side) -> Seen:
    """Return what a view shows of the teacher, as further arguments of a loss.

    Args:
        name: Of :data:`NAMES`; nothing is seen in ``""``.
        teacher: The teacher.
        student: The students' features of the train side, for the sentences that a reranker has ordered.

    Raises:
        ValueError: For another name.
    """
    if name not in NAMES:
        raise ValueError(f"view: must be one of {', '.join(NAMES)}, got {name!r}")
    train = teacher.sides["train"]
    if name == "":
        return lambda *_: {}
    if name == "features":
        return lambda _, rows, drawn: _features(train, rows, drawn)
    if name == "separate":
        apart = separated(train)
        return lambda _, rows, drawn: _features(apart, rows, drawn)
    if name in MAPS:

        def scores(_: Heads, rows: Tensor, drawn: Tensor) -> Mapping[str, Any]:
            seen = matrices(train.pictures[rows], train.sentences[rows, drawn])
            return {"scores": [MAPS[name](x.double(), teacher.span) for x in seen]}

        return scores
    if name == "ten ids":
        return lambda _, rows, __: {
            "order_pictures": rows,
            "order_listed": teacher.ids[rows],
            "order_grades": teacher.grades[rows],
        }
    grades = teacher.hard_scores
    if name == "reranker":  # the last has the grade 0
        grades = grades.argsort(1).argsort(1).float()
    sentences = student.sentences.flatten(0, 1)

    def lists(model: Heads, rows: Tensor, _: Tensor) -> Mapping[str, Any]:
        rows = rows[:RERANKED]
        with torch.random.fork_rng([]):  # the batches' dropped units stay those of the other arms
            return {"candidates": model.sentences(sentences[teacher.hard[rows]]), "grades": grades[rows]}

    return lists


def separated(side: Side) -> Side:
    """Return features of pictures, and of sentences, each multiplied by an orthogonal matrix of its own."""
    generator = torch.Generator().manual_seed(_SEED)
    width = side.pictures.shape[-1]
    found = (torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2))
    return Side(*(x @ q.to(x.dtype) for x, q in zip((side.pictures, side.sentences), found, strict=True)))


def _features(side: Side, rows: Tensor, drawn: Tensor) -> dict[str, Tensor]:
    return {
        "reference_image_features": side.pictures[rows],
        "reference_text_features": side.sentences[rows, drawn],
    }
