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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rankloss.blocks import Block, evaluate
from rankloss.embeddings import Embeddings, Lists
from rankloss.plackett_luce import ListOptions
from rankloss.plans import Plan

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
        for matrices in _matrices(embeddings, problem, weights, gradients):
            for rows in _slices(n, problem.plan.chunk_size):
                _add_chunk(matrices, rows, embeddings, shuffles, problem, weights, values)
            matrices.finish()
    if gradients is not None and problem.likelihood.worth == "exp":
        for gradient in gradients[:4]:
            if gradient is not None:
                gradient *= embeddings.scale
    return values


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class _Matrices(Protocol):
    """The two similarity matrices of a term, and where the gradients by them go."""

    lists: Lists
    in_modal: bool
    wants_gradient: bool

    def cosines(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of both."""

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor) -> None:
        """Take the gradient by some rows of one of them."""

    def finish(self) -> None:
        """Hand on what was kept back."""


class _Target(NamedTuple):
    """The gradients of a matrix's anchors and items and of the scale; None where none is wanted."""

    anchors: Tensor | None
    items: Tensor | None
    scale: Tensor | None


def _matrices(
    embeddings: Embeddings, problem: Problem, weights: Weights, gradients: Gradients | None
) -> Iterator[_Matrices]:
    """The pairs that are needed, made when their turn comes."""
    image, text, image_anchors, text_anchors, scale = gradients or Gradients(None, None, None, None, None)
    if embeddings.image_anchors is None:
        image_anchors, text_anchors = image, text
    if problem.likelihood.worth != "exp":
        scale = None  # the other worths do not depend on it
    if weights.contrastive is not None or weights.cross_modal is not None:
        lists = embeddings.lists("cross_modal")
        into = _Target(image_anchors, text, scale), _Target(text_anchors, image, scale)
        shared = problem.plan.name == "shared"
        yield _SharedMatrix(lists, into[0]) if shared else _RowBlocks(lists, into, in_modal=False)
    if weights.in_modal is not None:
        lists = embeddings.lists("in_modal")
        into = _Target(image_anchors, image, scale), _Target(text_anchors, text, scale)
        yield _RowBlocks(lists, into, in_modal=True)


class _RowBlocks:
    """Every block of rows is multiplied out when it is asked for."""

    def __init__(self, lists: Lists, into: tuple[_Target, _Target], *, in_modal: bool) -> None:
        self.lists, self.in_modal, self._into = lists, in_modal, into
        self.wants_gradient = any(x is not None for target in into for x in target)

    def cosines(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.lists.first.rows(rows).cosines(), self.lists.second.rows(rows).cosines()

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor) -> None:
        similarity, into = (self.lists.first, self.lists.second)[side].rows(rows), self._into[side]
        if into.anchors is not None:
            by_anchor = gradient @ similarity.items
            into.anchors[rows] += by_anchor
            if into.scale is not None:
                into.scale.add_((by_anchor * similarity.anchors).sum())
        elif into.scale is not None:
            into.scale.add_((gradient * cosines).sum())
        if into.items is not None:
            into.items.addmm_(gradient.T, similarity.anchors)

    def finish(self) -> None:
        pass


class _SharedMatrix:
    """S is multiplied out once; R is its transpose, and one matrix takes the gradient by both."""

    in_modal = False

    def __init__(self, lists: Lists, into: _Target) -> None:
        self.lists = lists
        self._whole = _RowBlocks(lists, (into, into), in_modal=False)
        self.wants_gradient = self._whole.wants_gradient
        self._cosines = lists.first.cosines()
        self._gradient = torch.zeros_like(self._cosines) if self.wants_gradient else self._cosines[:0]

    def cosines(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self._cosines[rows], self._cosines[:, rows].T.contiguous()

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor) -> None:  # noqa: ARG002
        if side == 0:
            self._gradient[rows] += gradient
        else:
            self._gradient[:, rows] += gradient.T

    def finish(self) -> None:
        if self.wants_gradient:
            self._whole.add(0, slice(0, len(self._cosines)), self._cosines, self._gradient)


def _add_chunk(
    matrices: _Matrices,
    rows: slice,
    embeddings: Embeddings,
    shuffles: Tensor | None,
    problem: Problem,
    weights: Weights,
    values: list[Tensor | None],
) -> None:
    """Add values and gradients of the lists of some anchors in one pair of matrices."""
    cosines = matrices.cosines(rows)
    rank_term = 2 if matrices.in_modal else 1
    alpha, beta = (None if matrices.in_modal else weights.contrastive), weights[rank_term]
    for side, other in ((0, matrices.lists.second), (1, matrices.lists.first)):
        reference = other.reference(cosines[1 - side])
        gradient = torch.empty_like(cosines[side]) if matrices.wants_gradient else None
        for part in _slices(len(reference), problem.plan.slice_size):
            anchors = slice(rows.start + part.start, rows.start + part.stop)
            block = Block(
                cosines=cosines[side][part],
                own=torch.arange(anchors.start, anchors.stop, device=reference.device) + problem.first_row,
                alpha=_half(alpha, anchors),
                beta=_half(beta, anchors),
                reference=reference[part],
                shuffle=None if shuffles is None else shuffles[2 * matrices.in_modal + side],
                gradient=None if gradient is None else gradient[part],
            )
            cross_entropy, nll = evaluate(block, embeddings.scale, problem.likelihood, problem.bins)
            for value, of_term in ((cross_entropy, values[0]), (nll, values[rank_term])):
                if value is not None and of_term is not None:
                    of_term[anchors] += value / 2
        if gradient is not None:
            matrices.add(side, rows, cosines[side], gradient)


def _half(weight: Tensor | None, anchors: slice) -> Tensor | None:
    """A weight for a block's rows; a term is the mean of two directions."""
    if weight is None:
        return None
    return weight / 2 if weight.dim() == 0 else weight[anchors, None] / 2
