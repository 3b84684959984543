r"""The one pass over a batch's rows that gives CLIP's loss, both rank terms and all their gradients.

The pass walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient
of every list at once (:mod:`rankloss.lists`), and adds the gradient to those of the embeddings
(:mod:`rankloss.products`); the chunk's matrices are then dropped. Memory therefore grows with N, apart from
what the plan ``shared`` keeps to save products, up to its budget.

One gradient by the scores serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I
and X the in-modal one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.batch import MATRICES, Batch, Inputs, Term, anchors_and_items, full_precision
from rankloss.lists import Block, Evaluated, evaluate
from rankloss.options import Plan, RankOptions
from rankloss.products import MirroredProducts, Products, Target
from rankloss.ranking import slices

__all__ = ["Terms", "stream"]

_FEW = {"cpu": 2**17}  # entries of a block: below, operations cost more to start than to carry out
_FEW_ELSEWHERE = 2**21


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
    device = batch.image.device
    sums = Inputs(
        *(
            None if x is None or not is_wanted else torch.zeros_like(x)
            for x, is_wanted in zip(batch.inputs, wanted or (False,) * len(batch.inputs), strict=True)
        )
    )
    given = [w for w in weights if w is not None]
    if not given:
        return weights, sums
    zeros = iter(torch.zeros(len(given), batch.anchors, dtype=torch.float64, device=device))
    values = Terms(*(None if w is None else next(zeros) for w in weights))
    # The largest weight is left to the end: beside worths far apart, small ones would round to zero.
    stacked = torch.stack(given)
    unit = stacked.abs().amax().clamp_min(torch.finfo(stacked.dtype).tiny)  # where all are 0
    relative = iter(stacked / unit)
    weights = Terms(*(None if w is None else next(relative) for w in weights))
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
    matrices = batch.matrices(term, are_references=weights[1] is not None and not batch.has_teacher)
    into = _targets(term, batch, sums, options)
    with_gradient = any(x is not None for target in into for x in target)
    products = (MirroredProducts if plan.name == "shared" else Products)(matrices, options.precision, into)
    references = None if weights[1] is None else batch.references(term, matrices)
    teacher = None
    if references is not None and batch.has_teacher:
        kind = MirroredProducts if plan.shares_reference else Products
        teacher = kind(references, options.precision)
    own = batch.own if weights[0] is not None or not options.diagonal else None
    alpha = _shared(weights[0], 0.5)
    betas = [_shared(weights[1], share) for share in dict.fromkeys(options.directions)]
    joins = len(betas) == 1 and _joins(plan, shuffles, batch)
    if joins:
        plan = replace(plan, ranked_size=2 * plan.chunk_size, slice_size=2 * plan.chunk_size)
    for rows in slices(batch.anchors, plan.chunk_size):
        cosines = products.take(rows)
        ranked_by = cosines if teacher is None else teacher.take(rows)
        blocks = []
        for side in (0, 1):
            beta = _of_rows(betas[side % len(betas)], rows)
            reference = None if references is None or beta is None else references[side]
            blocks.append(
                Block(
                    cosines[side],
                    None if own is None else own[rows],
                    batch.scale,
                    _of_rows(alpha, rows),
                    beta,
                    None if reference is None else ranked_by[1 - side if teacher is None else side],
                    None if reference is None else reference.first_equal,
                    batch.first_row + rows.start,
                    None if shuffles is None else shuffles[MATRICES.index(matrices[side].name)],
                )
            )
        found: Iterable[Evaluated]
        if joins:
            both = blocks[0].above(blocks[1], cosines.flatten(0, 1))
            found = evaluate(both, options, plan, with_gradient=with_gradient).halves()
        else:  # one after the other, so that one gradient is held at a time
            found = (evaluate(block, options, plan, with_gradient=with_gradient) for block in blocks)
        for side, of_side in enumerate(found):
            for value, part, share in zip(values, of_side[:2], (0.5, options.directions[side]), strict=True):
                if value is not None and part is not None:
                    value[rows].add_(part, alpha=share)
            if with_gradient:
                products.give(side, rows, cosines[side], of_side.gradient)
            del of_side  # before the other side has a gradient


def _joins(plan: Plan, shuffles: Tensor | None, batch: Batch) -> bool:
    """Whether the lists of both matrices are evaluated at once, which takes half as many operations."""
    few = _FEW.get(batch.image.device.type, _FEW_ELSEWHERE)
    return plan.kernel == "torch" and shuffles is None and plan.chunk_size * len(batch.image) <= few


def _shared(weight: Tensor | None, share: float) -> Tensor | None:
    """What one direction's values weigh, ``[]`` or ``[n]``; None for nothing."""
    return None if weight is None or share == 0 else weight * share


def _of_rows(weight: Tensor | None, rows: slice) -> Tensor | None:
    return weight if weight is None or weight.dim() == 0 else weight[rows, None]


def _targets(term: Term, batch: Batch, sums: Inputs, options: RankOptions) -> tuple[Target, Target]:
    scale = sums.scale if options.worth == "exp" else None  # the other worths do not depend on it
    first, second = anchors_and_items(term, sums, batch.image_anchors is not None)
    return Target(*first, scale), Target(*second, scale)
