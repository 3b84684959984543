"""The arms' losses in every view: CLIP's, and a term by which the student learns from what it sees.

V and T are the student's unit-norm features of N pairs and s the scale of its similarities.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloss
from rankloss import graded
from studies import distillation
from studies.distillation import Pair

from . import losses, student_losses
from .heads import WIDTH
from .student_losses import Beside, of_teacher
from .views import MAPS, Setting, matrices

Distance = Callable[[Tensor, Tensor], Tensor]  # of the student's scores and of those that are seen


def ranks(x: Tensor, y: Tensor, *, top_k: int) -> Tensor:
    """Plackett–Luce NLL per counted item of the seen scores' best ranks, averaged over the rows.

    It is ``rankloss.plackett_luce_nll(x, y, top_k=top_k)`` per counted item, without its order of all items.
    """
    least = y.topk(top_k).values[:, -1:]
    counted = (y >= least).sum(1)  # more than top_k where the last of them is tied
    grades, best = y.topk(int(counted.max()))
    rest = x.masked_fill(torch.zeros_like(x, dtype=torch.bool).scatter(1, best, True), -torch.inf)
    grades = grades.masked_fill(grades < least, -torch.inf)
    values, _ = graded.plackett_luce(x.gather(1, best).double(), grades.double(), rest, top_k=top_k)
    return (values / counted).mean().to(x.dtype)


def softmax(x: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """Cross-entropy of softmax rows, the seen scores being multiplied by a scale."""
    return distillation.soft_cross_entropy(x, (scale * y).to(x.dtype))


def pearson(x: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """One minus the correlation of softmax rows (DIST), the seen scores being multiplied by a scale."""
    return distillation.pearson_distance(x, (scale * y).to(x.dtype))


def mimicry(student: Pair, teacher: Pair, _: object) -> Tensor:
    """Mimicry of the teacher's first principal components."""
    return distillation.mimicry(student, _components(teacher))


def contrast(student: Pair, teacher: Pair, scales: tuple[Tensor, float]) -> Tensor:
    """Interactive contrast with the teacher's first principal components."""
    return distillation.contrast(student, _components(teacher), scales[1])


def _components(teacher: Pair) -> Pair:
    v, t = (F.normalize(x[:, :WIDTH], dim=-1) for x in teacher)
    return v, t


def squares(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of two matrices, each minus its mean and over its standard deviation."""
    mine, theirs = ((of - of.mean()) / of.std(correction=0) for of in (x, y.to(x.dtype)))
    return (mine - theirs).square().mean()


def of_scores(distance: Distance) -> Callable[..., Tensor]:
    """``½·Σ d(x, y)``: x = s·V·Tᵀ, s·T·Vᵀ, s·V·Vᵀ, s·T·Tᵀ, y the matrices that are seen, d the distance."""

    def term(v: Tensor, t: Tensor, scale: Tensor, *, scores: Sequence[Tensor]) -> Tensor:
        mine = [scale * x for x in matrices(v, t)]
        return distillation.sum_of(distance(x, y) for x, y in zip(mine, scores, strict=True)) / 2

    return term


def of_ids(
    v: Tensor, t: Tensor, scale: Tensor, *, order_pictures: Tensor, order_listed: Tensor, order_grades: Tensor
) -> Tensor:
    """``½·Σ C(x)``: x = S, Sᵀ, V·Vᵀ, T·Tᵀ times the scale, ranked by lists of ids.

    A pair's own item is the best of the cross-modal lists and left out of the others; the listed ones of the
    batch follow by their grades, and the rest stands below and is not counted. C is the Plackett–Luce NLL per
    counted item, the mean over the lists that have one.
    """
    own = torch.eye(len(v), dtype=torch.bool)
    there = order_listed[:, :, None] == order_pictures  # [N, K, N]
    grades = torch.where(there, order_grades[:, :, None].double(), -torch.inf).amax(1)
    best = grades.masked_fill(own, grades.amax() + 1)
    matrices = ((v @ t.T, best), (t @ v.T, best), (v @ v.T, grades), (t @ t.T, grades))
    terms = [_of_list(scale * x, of, is_rest=of.isneginf() & ~own) for x, of in matrices]
    return distillation.sum_of(terms) / 2


def _of_list(x: Tensor, grades: Tensor, *, is_rest: Tensor) -> Tensor:
    padded = grades.masked_fill(grades.isneginf(), torch.inf)
    rest = x.masked_fill(~is_rest, -torch.inf)
    values, counted = graded.plackett_luce(x.double(), padded, rest)
    return ((values / counted.clamp_min(1)).sum() / (counted > 0).sum().clamp_min(1)).to(x.dtype)


def soft_labels(
    v: Tensor, t: Tensor, scale: Tensor, *, order_pictures: Tensor, order_listed: Tensor, **_: Tensor
) -> Tensor:
    """Cross-entropy from the listed ids in the batch, equally likely, both ways' mean.

    A row without a listed id in the batch counts nothing.
    """
    listed = (order_listed[:, :, None] == order_pictures).any(1)
    counted, logits = listed.any(1), scale * v @ t.T
    labels = F.normalize(listed[counted].to(logits.dtype), p=1, dim=1)
    total = sum(F.cross_entropy(x[counted], labels, reduction="sum") for x in (logits, logits.T)) / 2
    return total / counted.sum().clamp_min(1)


def of_lists(lists: rankloss.RankedLists, grades_scale: float) -> Callable[..., Tensor]:
    """A loss of lists: the orders of sentences of the batch's first pictures, their grades times a scale."""

    def term(v: Tensor, _: Tensor, scale: Tensor, *, candidates: Tensor, grades: Tensor) -> Tensor:
        return lists(v[: len(grades)], candidates, grades_scale * grades, scale)

    return term


_LISTS: dict[tuple[str, str], rankloss.losses.ranked_lists.ListModel] = {
    ("reranker", "ranks"): "plackett_luce",
    ("reranker", "pairwise"): "pairwise",
    ("reranker with scores", "softmax"): "top_one",
}


def build(setting: Setting, widths: tuple[int, int]) -> nn.Module:
    """Return the loss of a setting's arm in its view.

    Args:
        setting: The setting.
        widths: Of the teacher's features.

    Raises:
        ValueError: For an arm that the view does not have.
    """
    view, arm, weight, scale = setting.view, setting.loss, setting.weight, setting.scale
    base = losses.build("clip", label_smoothing=setting.label_smoothing)
    if view == "separate" and arm in ("ranks", "softmax", "cka", "projected-mimicry"):
        names = ("weight", "top_k", "scale", "label_smoothing")
        named = {name: getattr(setting, name) for name in names}
        return student_losses.build(arm, WIDTH, widths, **named)
    distances: dict[str, Distance] = {
        "ranks": functools.partial(ranks, top_k=setting.top_k),
        "softmax": functools.partial(softmax, scale=scale),
        "pearson": functools.partial(pearson, scale=scale),
        "squares": squares,
    }
    terms: dict[tuple[str, str], Callable[..., Tensor]] = {
        ("features", "mimicry"): of_teacher(mimicry),
        ("features", "contrast"): of_teacher(contrast, scale),
        ("features", "softmax"): of_teacher(distillation.softmax, scale),
        ("ten ids", "ranks"): of_ids,
        ("ten ids", "soft-labels"): soft_labels,
        **{(view, arm): of_scores(distance) for view in MAPS for arm, distance in distances.items()},
    }
    if (view, arm) in terms:
        return Beside(base, weight, terms[view, arm])
    if (view, arm) in _LISTS:
        grades = scale if view == "reranker with scores" else 1.0
        return Beside(base, weight, of_lists(rankloss.RankedLists(model=_LISTS[view, arm]), grades))
    if (view, arm) == ("", "clip"):
        return base
    ranked = rankloss.RankClipLoss(base, lambda_cross=weight, lambda_in=weight, top_k=setting.top_k or None)
    if (view, arm) == ("features", "ranks"):
        return ranked
    if (view, arm) == ("features", "mimicry-and-ranks"):
        return Beside(ranked, setting.mimicry, of_teacher(mimicry), base_is_taught=True)
    raise ValueError(f"loss: the view {view!r} has no arm {arm!r}")
