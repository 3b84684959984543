r"""The one pass over a batch's rows that gives CLIP's loss, both rank terms and all their gradients.

The pass walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient
of every list at once (:mod:`rankloss.lists`), and adds the gradient to those of the embeddings
(:mod:`rankloss.products`); the chunk's matrices are then dropped. Memory therefore grows with N, apart from
what the plan ``shared`` keeps to save products, up to its budget.

One gradient by the scores serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I
and X the in-modal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.batch import MATRICES, Batch, Inputs, Term, anchors_and_items, full_precision
from rankloss.lists import Block, evaluate
from rankloss.options import Plan, RankOptions
from rankloss.products import MirroredProducts, Products, Target
from rankloss.ranking import slices

__all__ = ["Terms", "stream"]


class Terms(NamedTuple):
    """One thing for each term; None where a term is left out."""

    contrastive: Tensor | None
    cross_modal: Tensor | None
    in_modal: Tensor | None


def stream(
    batch: Batch,
    options: RankOptions,
    plan: Plan,
    weights: Terms,
    shuffles: Tensor | None = None,
    wanted: Sequence[bool] = (),
) -> tuple[Terms, Inputs]:
    """Values and gradients of the terms that have a weight.

    Args:
        batch: the features.
        options: of the rank terms.
        plan: how the pass is computed.
        weights: what an anchor's value counts in the total, ``[]`` or ``[n]`` in float64, by term. The
            contrastive term needs the worth ``exp``.
        shuffles: ``[4, N]`` under ``ties="random"``, for the lists of S, R, I and X; else None.
        wanted: for which of the batch's inputs a gradient is wanted; empty for none.

    Returns:
        The values per anchor, ``[n]`` in float64, the two directions of a term together, and the gradients of
        Σ weights·values; None where there is no weight, or no gradient is wanted.
    """
    n, device = batch.anchors, batch.image.device
    values = Terms(
        *(None if w is None else torch.zeros(n, dtype=torch.float64, device=device) for w in weights)
    )
    sums = Inputs(
        *(
            None if x is None or not is_wanted else torch.zeros_like(x)
            for x, is_wanted in zip(batch.inputs, wanted or (False,) * len(batch.inputs), strict=True)
        )
    )
    if all(w is None for w in weights):
        return values, sums
    # The largest weight is left to the end: beside worths far apart, small ones would round to zero.
    unit = _largest(weights)
    weights = Terms(*(None if w is None else w / unit for w in weights))
    with full_precision(device):
        if weights.contrastive is not None or weights.cross_modal is not None:
            of_terms = weights.contrastive, weights.cross_modal
            _stream_term("cross_modal", batch, options, plan, of_terms, values[:2], shuffles, sums)
        if weights.in_modal is not None:
            of_terms = None, weights.in_modal
            _stream_term("in_modal", batch, options, plan, of_terms, (None, values[2]), shuffles, sums)
    *features, scale = sums
    factor = unit * batch.scale if options.worth == "exp" else unit
    for gradient in features:
        if gradient is not None:
            gradient *= factor
    if scale is not None:
        scale *= unit
    return values, sums


def _stream_term(
    term: Term,
    batch: Batch,
    options: RankOptions,
    plan: Plan,
    weights: tuple[Tensor | None, Tensor | None],
    values: tuple[Tensor | None, Tensor | None],
    shuffles: Tensor | None,
    sums: Inputs,
) -> None:
    """Add the values and gradients of the rows of S and R, or of I and X.

    ``weights`` and ``values`` are those of the cross-entropy and of the rank term; ``sums`` are gradients.
    """
    matrices = batch.matrices(term)
    into = _targets(term, batch, sums, options)
    with_gradient = any(x is not None for target in into for x in target)
    products = (MirroredProducts if plan.name == "shared" else Products)(matrices, into)
    references = None if weights[1] is None else batch.references(term, matrices)
    teacher = None
    if references is not None and batch.has_teacher:
        teacher = (MirroredProducts if plan.shares_reference else Products)(references)
    own = batch.own
    for rows in slices(batch.anchors, plan.chunk_size):
        cosines = products.take(rows)
        ranked_by = cosines[::-1] if teacher is None else teacher.take(rows)
        for side, share in enumerate(options.directions):
            alpha, beta = _of_rows(weights[0], rows, 0.5), _of_rows(weights[1], rows, share)
            block = Block(
                cosines[side],
                own[rows],
                batch.scale,
                alpha,
                beta,
                None if beta is None else ranked_by[side],
                None if references is None else references[side].first_equal,
                batch.first_row + rows.start,
                None if shuffles is None else shuffles[MATRICES.index(matrices[side].name)],
            )
            found = evaluate(block, options, plan, with_gradient=with_gradient)
            for value, part, weight in zip(values, found[:2], (0.5, share), strict=True):
                if value is not None and part is not None:
                    value[rows].add_(part, alpha=weight)
            if with_gradient:
                products.give(side, rows, cosines[side], found.gradient)


def _of_rows(weight: Tensor | None, rows: slice, share: float) -> Tensor | None:
    """What one direction's values weigh in a block of rows, ``[]`` or ``[rows, 1]``; None for nothing."""
    if weight is None or share == 0:
        return None
    return weight * share if weight.dim() == 0 else weight[rows, None] * share


def _targets(term: Term, batch: Batch, sums: Inputs, options: RankOptions) -> tuple[Target, Target]:
    scale = sums.scale if options.worth == "exp" else None  # the other worths do not depend on it
    first, second = anchors_and_items(term, sums, batch.image_anchors is not None)
    return Target(*first, scale), Target(*second, scale)


def _largest(weights: Terms) -> Tensor:
    """The largest of the weights by size, or 1 where all are 0."""
    largest = torch.stack([w.abs().amax() for w in weights if w is not None]).amax()
    return largest.where(largest > 0, 1.0)
