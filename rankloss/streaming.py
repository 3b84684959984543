r"""The one pass over a batch's rows that gives CLIP's loss, both rank terms and all their gradients.

The pass walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient
of every list at once (:mod:`rankloss.blocks`), and adds the gradient into those of the embeddings; the
chunk's matrices are then dropped, so memory grows with N and not with N².

With G the gradient of the weighted total by the scores s·C, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q.

One G serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I and X the in-modal one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rankloss.blocks import Block, evaluate
from rankloss.embeddings import Embeddings, other_items
from rankloss.matrix_pairs import MatrixPair, MirroredPair, Target
from rankloss.options import RankOptions
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
        options: of the rank terms.
        plan: how it is computed.
        first_row: the first anchor's own place among the items.
    """

    options: RankOptions
    plan: Plan
    first_row: int = 0


def stream(
    embeddings: Embeddings,
    shuffles: Tensor | None,
    problem: Problem,
    weights: Weights,
    gradients: Gradients | None = None,
) -> list[Tensor | None]:
    """Values per anchor, ``[n]`` in float64, of each term that has a weight: its two directions together.

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
    if gradients is not None and problem.options.worth == "exp":
        for gradient in gradients[:4]:
            if gradient is not None:
                gradient *= embeddings.scale
    return values


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _pairs(
    embeddings: Embeddings, problem: Problem, weights: Weights, gradients: Gradients | None
) -> Iterator[MatrixPair]:
    """The pairs of matrices that are needed, made when their turn comes."""
    image, text, image_anchors, text_anchors, scale = gradients or Gradients(None, None, None, None, None)
    if embeddings.image_anchors is None:
        image_anchors, text_anchors = image, text
    if problem.options.worth != "exp":
        scale = None  # the other worths do not depend on it
    make = MirroredPair if problem.plan.name == "shared" else MatrixPair
    if weights.contrastive is not None or weights.cross_modal is not None:
        into = Target(image_anchors, text, scale), Target(text_anchors, image, scale)
        yield make(embeddings.lists("cross_modal"), into, in_modal=False)
    if weights.in_modal is not None:
        into = Target(image_anchors, image, scale), Target(text_anchors, text, scale)
        yield make(embeddings.lists("in_modal"), into, in_modal=True)


def _add_chunk(
    pair: MatrixPair,
    rows: slice,
    embeddings: Embeddings,
    shuffles: Tensor | None,
    problem: Problem,
    weights: Weights,
    values: list[Tensor | None],
) -> None:
    """Add values and gradients of the lists of some anchors in one pair of matrices."""
    cosines, options = pair.cosines(rows), problem.options
    own = torch.arange(rows.start, rows.stop, device=cosines[0].device) + problem.first_row
    term = 2 if pair.in_modal else 1
    for side, other in ((0, pair.lists.second), (1, pair.lists.first)):
        share = options.directions[side]  # of the two directions that a term is made of
        alpha = None if pair.in_modal else _of_rows(weights.contrastive, rows, 0.5)
        beta = _of_rows(weights[term], rows, share) if share else None
        gradient = None
        if pair.wants_gradient and (alpha is not None or beta is not None):
            gradient = torch.empty_like(cosines[side])
        block = Block(cosines[side], own, alpha, beta, None, gradient)
        reference = None if beta is None else other.reference(cosines[1 - side])
        shuffle = None if shuffles is None else shuffles[2 * pair.in_modal + side]
        cross_entropy, nll = _evaluate(block, reference, shuffle, embeddings.scale, problem)
        for value, of_term, part in ((cross_entropy, values[0], 0.5), (nll, values[term], share)):
            if value is not None and of_term is not None:
                of_term[rows] += part * value
        if pair.wants_gradient:
            pair.add(side, rows, cosines[side], gradient)


def _of_rows(weight: Tensor | None, rows: slice, share: float) -> Tensor | None:
    """What a direction's values weigh in a block of rows, ``[]`` or ``[rows, 1]``."""
    if weight is None:
        return None
    return weight * share if weight.dim() == 0 else weight[rows, None] * share


_Values: TypeAlias = tuple[Tensor | None, Tensor | None]  # CE and NLL of every row; None without a weight


def _evaluate(
    block: Block, reference: Tensor | None, shuffle: Tensor | None, scale: Tensor, problem: Problem
) -> _Values:
    """The values of every row; the block's gradient is filled."""
    if reference is None:
        return _in_slices(block, scale, problem)
    evaluate_lists = _evaluate_lists if problem.options.diagonal else _evaluate_lists_of_others
    return _joined(
        evaluate_lists(block.rows(rows), reference[rows], shuffle, scale, problem)
        for rows in _slices(len(block.cosines), problem.plan.ranked_size)
    )


def _evaluate_lists(
    block: Block, reference: Tensor, shuffle: Tensor | None, scale: Tensor, problem: Problem
) -> _Values:
    options = problem.options
    ranking = rank(reference, options, shuffle, options.bins_or_none)
    return _in_slices(block._replace(ranking=ranking), scale, problem)


def _evaluate_lists_of_others(
    block: Block, reference: Tensor, shuffle: Tensor | None, scale: Tensor, problem: Problem
) -> _Values:
    """The cross-entropy is of all items, the lists are of all but the anchor's own pair: two matrices."""
    cross_entropy, _ = _in_slices(block._replace(beta=None), scale, problem)
    others = other_items(block.own, block.cosines.shape[-1])
    cosines = block.cosines.gather(-1, others)
    gradient = None if block.gradient is None else torch.empty_like(cosines)
    lists = Block(cosines, block.own, alpha=None, beta=block.beta, ranking=None, gradient=gradient)
    _, nll = _evaluate_lists(lists, reference.gather(-1, others), shuffle, scale, problem)
    if block.gradient is not None and gradient is not None:
        block.gradient.scatter_add_(-1, others, gradient)
    return cross_entropy, nll


def _in_slices(block: Block, scale: Tensor, problem: Problem) -> _Values:
    """As many rows at a time as a core's cache serves."""
    if block.alpha is None and block.beta is None:
        if block.gradient is not None:
            block.gradient.zero_()
        return None, None
    slices = _slices(len(block.cosines), problem.plan.slice_size)
    return _joined(evaluate(block.rows(part), scale, problem.options) for part in slices)


def _joined(parts: Iterable[_Values]) -> _Values:
    cross_entropy, nll = (None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
    return cross_entropy, nll
