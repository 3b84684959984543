"""The arms' losses: CLIP's, and terms by which the student learns from two encoders.

V and T are the student's unit-norm features of N pairs and s the scale of its similarities; V' and T' are
the features of two encoders, which have no common space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
from rankloss_trainers.own_losses import RankClipEncoders
from studies.distillation import Pair, distances, pearson_within, softmax_within, sum_of

from . import losses

RANKED: dict[str, tuple[bool, bool]] = {  # whether the pictures' and the sentences' encoder rank
    "picture-ranks": (True, False),
    "text-ranks": (False, True),
    "ranks": (True, True),
}
TEACHER = ("reference_image_features", "reference_text_features")
PER_STEP = "ranks-per-step"  # ranks, with a λ that rises at every step
TOP_ONE = "top-one"  # softmax, by the library's own options
ENCODERS = "rankclip-encoders"  # the trainers' loss of this name, as it is


def cka(student: Pair, teacher: Pair) -> Tensor:
    """One minus linear CKA, the mean of both modalities: ``½[1 − c(V, V') + 1 − c(T, T')]``.

    ``c(X, Y) = ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖)`` of columns minus their means, in Frobenius norms.
    """
    found = []
    for features in zip(student, teacher, strict=True):
        x, y = (of - of.mean(0) for of in features)
        same = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
        found.append(1 - (x.T @ y).square().sum() / same)
    return torch.stack(found).mean()


# Terms without parameters, of the student's features, the teacher's, and the scales of both similarities.
TERMS: dict[str, Callable[[Pair, Pair, tuple[Tensor, float]], Tensor]] = {
    "softmax": softmax_within,
    "pearson": pearson_within,
    "distances": lambda student, teacher, _: distances(student, teacher),
    "cka": lambda student, teacher, _: cka(student, teacher),
}
ARMS = ("clip", "rankclip", *RANKED, *TERMS, "projected-mimicry")


class Beside(nn.Module):
    """CLIP's loss and a weighted term: ``L(V, T, s) + weight·term(V, T, s, …)``.

    Args:
        base: CLIP's loss.
        weight: Of the term.
        term: Of the student's features, the scale, and what is seen by its names.
        base_is_taught: The base gets what is seen, too.
    """

    def __init__(
        self, base: nn.Module, weight: float, term: Callable[..., Tensor], *, base_is_taught: bool = False
    ) -> None:
        super().__init__()
        self.base, self.weight, self.term, self.base_is_taught = base, weight, term, base_is_taught

    def forward(self, v: Tensor, t: Tensor, scale: Tensor, **seen: Any) -> Tensor:
        """Return the loss."""
        given = seen if self.base_is_taught else {}
        return self.base(v, t, scale, **given) + self.weight * self.term(v, t, scale, **seen)


def of_teacher(term: Callable[..., Tensor], teachers_scale: float = 0.0) -> Callable[..., Tensor]:
    """Return a term ``(student, teacher, scales)`` as :class:`Beside` calls it."""

    def called(v: Tensor, t: Tensor, scale: Tensor, **teacher: Tensor) -> Tensor:
        return term((v, t), tuple(teacher[name] for name in TEACHER), (scale, teachers_scale))

    return called


class ProjectedMimicry(nn.Module):
    """``mean_i ‖P·v_i/‖P·v_i‖ − v'_i‖² + mean_i ‖Q·t_i/‖Q·t_i‖ − t'_i‖²``, P and Q learned.

    Args:
        width: Of the student's features.
        widths: Of the teacher's.
    """

    def __init__(self, width: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, of, bias=False) for of in widths)

    def forward(self, v: Tensor, t: Tensor, _: object, **teacher: Tensor) -> Tensor:
        """Return the term."""
        pairs = zip(self.projections, (v, t), TEACHER, strict=True)
        return sum_of(
            (normalize(project(x), dim=-1) - teacher[name]).square().sum(-1).mean()
            for project, x, name in pairs
        )


def build(
    arm: str, width: int, widths: tuple[int, int], *, weight: float = 0.0, top_k: int = 0, scale: float = 0.0,
    label_smoothing: float = 0.0,
) -> nn.Module:  # fmt: skip
    """Return an arm's loss.

    Args:
        arm: A name of :data:`ARMS`, :data:`PER_STEP`, :data:`TOP_ONE` or :data:`ENCODERS`.
        width: Of the student's features.
        widths: Of the teacher's.
        weight: Of the added term; of ranks, what multiplies λ.
        top_k: The best ranks that count; 0: all.
        scale: Of the teacher's similarities.
        label_smoothing: Of CLIP's loss.

    Raises:
        ValueError: For another name.
    """
    base = losses.build("clip", label_smoothing=label_smoothing)
    if arm == "clip":
        return base
    if arm == "rankclip":
        return rankloss.RankClipLoss(base, lambda_cross=weight, lambda_in=weight)
    if arm in RANKED or arm == PER_STEP:
        return rankloss.RankClipLoss(base, lambda_cross=0.0, lambda_in=weight, top_k=top_k or None)
    if arm == TOP_ONE:
        return rankloss.RankClipLoss(
            base, lambda_cross=0.0, lambda_in=weight, schedule="constant", model="top_one",
            reference_scale=scale, diagonal=False,
        )  # fmt: skip
    if arm == ENCODERS:
        return RankClipEncoders.of({}).build(base, rankloss.Gather())
    if arm in TERMS:
        return Beside(base, weight, of_teacher(TERMS[arm], scale))
    if arm == "projected-mimicry":
        return Beside(base, weight, ProjectedMimicry(width, widths))
    raise ValueError(f"arm: must be one of {', '.join(ARMS)}, got {arm!r}")


def references(arm: str, teacher: Pair) -> dict[str, Tensor]:
    """Return the teacher's features that an arm's loss is given, by their names."""
    given = RANKED.get(arm, (arm not in ("clip", "rankclip"),) * 2)
    return {name: x for name, x, use in zip(TEACHER, teacher, given, strict=True) if use}
