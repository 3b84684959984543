r"""The one pass over a batch's rows that gives CLIP's loss, both rank terms and all their gradients.

The pass walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient
of every list at once (:mod:`rankloss.blocks`), and adds the gradient into those of the embeddings; the
chunk's matrices are then dropped, so memory grows with N and not with N².

With G the gradient of the weighted total by the scores s·C, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q.

One G serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I and X the in-modal one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.blocks import Block, evaluate
from rankloss.embeddings import Embeddings, Lists
from rankloss.plackett_luce import ListOptions
from rankloss.plans import Plan
from rankloss.ranked_sums import rank

__all__ = ["Gradients", "Problem", "Weights", "stream"]


class Weights(NamedTuple):
    """What an anchor's value counts in the total, by term: ``[]`` or ``[n]``; None leaves the term out."""

    contrastive: Tensor | None
    cross_modal: Tensor | None
    in_modal: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the inputs; None where none is wanted."""

    image: Tensor | None
    text: Tensor | None
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor | None


@dataclass(frozen=True)
class Problem:
    """What a pass computes, its tensors apart.

    Attributes:
        likelihood: the lists' likelihood.
        bins: rank by so many bins of the reference; None by its exact order.
        plan: how it is computed.
        first_row: the first anchor's own place among the items.
    """

    likelihood: ListOptions
    bins: int | None
    plan: Plan
    first_row: int = 0


def stream(
    embeddings: Embeddings,
    shuffles: Tensor | None,
    problem: Problem,
    weights: Weights,
    gradients: Gradients | None = None,
) -> list[Tensor | None]:
    """Values per anchor, ``[n]`` in float64, of each term that has a weight: the mean of its two directions.

    Args:
        embeddings: the batch.
        shuffles: ``[4, N]`` under ``ties="random"``, for the lists of S, R, I and X; else None.
        problem: what to compute.
        weights: of the terms. The contrastive term needs the worth ``exp``.
        gradients: zeros to which the gradient of Σ weights·values is added; None computes values only.
    """
    n, device = embeddings.anchors, embeddings.image.device
    values = [None if w is None else torch.zeros(n, dtype=torch.float64, device=device) for w in weights]
    # An enclosing autocast region would turn these products into half precision.
    with torch.autocast(device_type=device.type, enabled=False):
        for pair in _pairs(embeddings, problem, weights, gradients):
            for rows in _slices(n, problem.plan.chunk_size):
                _add_chunk(pair, rows, embeddings, shuffles, problem, weights, values)
    if gradients is not None and problem.likelihood.worth == "exp":
        for gradient in gradients[:4]:
            if gradient is not None:
                gradient *= embeddings.scale
    return values


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class _Target(NamedTuple):
    """The gradients of a matrix's anchors and items and of the scale; None where none is wanted."""

    anchors: Tensor | None
    items: Tensor | None
    scale: Tensor | None


def _pairs(
    embeddings: Embeddings, problem: Problem, weights: Weights, gradients: Gradients | None
) -> Iterator[_Pair]:
    """The pairs of matrices that are needed, made when their turn comes."""
    image, text, image_anchors, text_anchors, scale = gradients or Gradients(None, None, None, None, None)
    if embeddings.image_anchors is None:
        image_anchors, text_anchors = image, text
    if problem.likelihood.worth != "exp":
        scale = None  # the other worths do not depend on it
    make = _MirroredPair if problem.plan.name == "shared" else _Pair
    if weights.contrastive is not None or weights.cross_modal is not None:
        into = _Target(image_anchors, text, scale), _Target(text_anchors, image, scale)
        yield make(embeddings.lists("cross_modal"), into, in_modal=False)
    if weights.in_modal is not None:
        into = _Target(image_anchors, image, scale), _Target(text_anchors, text, scale)
        yield make(embeddings.lists("in_modal"), into, in_modal=True)


class _Pair:
    """The two similarity matrices of a term, by blocks of rows, and where the gradients by them go."""

    def __init__(self, lists: Lists, into: tuple[_Target, _Target], *, in_modal: bool) -> None:
        self.lists, self.in_modal, self._into = lists, in_modal, into
        self.wants_gradient = any(x is not None for target in into for x in target)

    def cosines(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of both."""
        return self.lists.first.rows(rows).cosines(), self.lists.second.rows(rows).cosines()

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor) -> None:
        """Take the gradient by some rows of one of them; it may end before the last items."""
        similarity, into = (self.lists.first, self.lists.second)[side].rows(rows), self._into[side]
        items = slice(gradient.shape[-1])
        if into.anchors is not None:
            by_anchor = gradient @ similarity.items[items]
            into.anchors[rows] += by_anchor
            if into.scale is not None:
                into.scale.add_((by_anchor * similarity.anchors).sum())
        elif into.scale is not None:
            into.scale.add_((gradient * cosines[:, items]).sum())
        if into.items is not None:
            into.items[items].addmm_(gradient.T, similarity.anchors)


class _MirroredPair(_Pair):
    """Entries that are one and the same product take their gradients to the embeddings together.

    v_i·t_j stands in S at (i, j) and in R at (j, i), v_i·v_j in I at (i, j) and at (j, i). The gradient by an
    entry above the diagonal waits until the rows reach its mirror image below, and is added to that one's:
    half of the products with the embeddings fall away, for half a matrix that waits on either side.
    """

    def __init__(self, lists: Lists, into: tuple[_Target, _Target], *, in_modal: bool) -> None:
        super().__init__(lists, into, in_modal=in_modal)
        self._waiting: tuple[list[Tensor], list[Tensor]] = [], []

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor) -> None:
        """Take the gradient by some rows; they come one block after the other, the first side first."""
        n = gradient.shape[-1]
        mirror = self._waiting[side if self.in_modal else 1 - side]
        # What waits of a block of rows are its last columns; those of the rows' own block are not among them.
        met = [x[:, rows.start - n : rows.stop - n or None] for x in mirror if x.shape[-1] >= n - rows.start]
        if met:
            gradient[:, : rows.start] += torch.cat(met).T
        self._waiting[side].append(gradient[:, rows.stop :].clone())
        super().add(side, rows, cosines, gradient[:, : rows.stop])


def _add_chunk(
    pair: _Pair,
    rows: slice,
    embeddings: Embeddings,
    shuffles: Tensor | None,
    problem: Problem,
    weights: Weights,
    values: list[Tensor | None],
) -> None:
    """Add values and gradients of the lists of some anchors in one pair of matrices."""
    cosines = pair.cosines(rows)
    rank_term = 2 if pair.in_modal else 1
    alpha, beta = (None if pair.in_modal else weights.contrastive), weights[rank_term]
    for side, other in ((0, pair.lists.second), (1, pair.lists.first)):
        ranking = None
        if beta is not None:
            reference = other.reference(cosines[1 - side])
            shuffle = None if shuffles is None else shuffles[2 * pair.in_modal + side]
            ranking = rank(reference, problem.likelihood, shuffle, problem.bins)
        gradient = torch.empty_like(cosines[side]) if pair.wants_gradient else None
        for part in _slices(len(cosines[side]), problem.plan.slice_size):
            anchors = slice(rows.start + part.start, rows.start + part.stop)
            block = Block(
                cosines=cosines[side][part],
                own=torch.arange(anchors.start, anchors.stop, device=cosines[side].device)
                + problem.first_row,
                alpha=_half(alpha, anchors),
                beta=_half(beta, anchors),
                ranking=None if ranking is None else ranking.rows(part),
                gradient=None if gradient is None else gradient[part],
            )
            cross_entropy, nll = evaluate(block, embeddings.scale, problem.likelihood)
            for value, of_term in ((cross_entropy, values[0]), (nll, values[rank_term])):
                if value is not None and of_term is not None:
                    of_term[anchors] += value / 2
        if gradient is not None:
            pair.add(side, rows, cosines[side], gradient)


def _half(weight: Tensor | None, anchors: slice) -> Tensor | None:
    """A weight for a block's rows; a term is the mean of two directions."""
    if weight is None:
        return None
    return weight / 2 if weight.dim() == 0 else weight[anchors, None] / 2
