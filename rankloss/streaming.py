r"""The one pass over a batch's rows that gives CLIP's loss, both rank terms and all their gradients.

The pass walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient
of every list at once (:mod:`rankloss.lists`), and adds the gradient to those of the embeddings
(:mod:`rankloss.products`); the chunk's matrices are then dropped. Memory therefore grows with N, apart from
what the plan ``shared`` keeps to save products, up to its budget.

One gradient by the scores serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I
and X the in-modal one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rankloss.batch import MATRICES, Batch, Inputs, Matrix, Term, anchors_and_items
from rankloss.lists import Block, evaluate
from rankloss.options import Plan, RankOptions
from rankloss.precision import full_precision
from rankloss.products import MirroredProducts, Products, Target
from rankloss.ranking import slices

__all__ = ["Terms", "stream"]

# Entries of all lists of a block: below, operations cost more to start than to carry out.
_FEW = {"cpu": 2**18}
_FEW_ELSEWHERE = 2**22

_T = TypeVar("_T")

_RANK_TERMS: tuple[Term, Term] = ("cross_modal", "in_modal")


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
) -> tuple[Tensor, Inputs, Tensor]:
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
        The values per anchor of those terms, ``[terms, n]`` in float64, the two directions of a term
        together; the gradients of Σ weights·values, None where none is wanted; and a factor, ``[]`` in
        float64, by which all gradients but that by the scale have still to be multiplied, so that whoever
        multiplies them anyway does so once.
    """
    device = batch.image.device
    given = [w for w in weights if w is not None]
    # Each term's values in both directions, multiplied by their shares; with one direction the other stays 0.
    new = torch.empty if options.fixed_reference is None else torch.zeros
    values = new(len(given), 2, batch.anchors, dtype=torch.float64, device=device)
    all_at_once = _at_once(_RANK_TERMS, batch, options, plan, weights, shuffles)
    sums = Inputs(
        *(
            None
            if x is None or not is_wanted
            else (torch.empty_like if all_at_once and x.dim() else torch.zeros_like)(x)
            for x, is_wanted in zip(batch.inputs, wanted or (False,) * len(batch.inputs), strict=True)
        )
    )
    if not given:
        return values.sum(1), sums, torch.ones((), dtype=torch.float64, device=device)
    # The largest weight is left to the end: beside worths far apart, small ones would round to zero.
    stacked = torch.stack(given)
    largest = torch.linalg.vector_norm(stacked, math.inf)
    unit = largest.clamp_min_(torch.finfo(stacked.dtype).tiny)  # where all are 0
    halves = iter((stacked / unit).mul_(0.5))  # a term is the mean of its two directions
    weights = Terms(*(None if w is None else next(halves) for w in weights))
    of_terms = iter(values)
    found = Terms(*(None if w is None else next(of_terms) for w in weights))
    walks: list[Sequence[Term]] = [_RANK_TERMS] if all_at_once else [(term,) for term in _RANK_TERMS]
    with full_precision(device):
        for terms in walks:
            if any(w is not None for term in terms for w in _of_term(term, weights)):
                at_once = all_at_once or _at_once(terms, batch, options, plan, weights, shuffles)
                _walk(terms, batch, options, plan, weights, shuffles, found, sums, at_once=at_once)
    if sums.scale is not None:
        sums.scale.mul_(unit)
    return values.sum(1), sums, unit * batch.scale if options.worth == "exp" else unit


def _of_term(term: Term, of: Terms) -> tuple[Tensor | None, Tensor | None]:
    """What belongs to the cross-entropy and to the ranking of the two matrices that a term compares."""
    return (of.contrastive, of.cross_modal) if term == "cross_modal" else (None, of.in_modal)


def _at_once(
    terms: Sequence[Term],
    batch: Batch,
    options: RankOptions,
    plan: Plan,
    weights: Terms,
    shuffles: Tensor | None,
) -> bool:
    """Whether the lists of all matrices of these terms are evaluated in one go, a chunk of rows at a time.

    That takes fewer operations, and the kernel then reads each cosine once. The lists of one matrix after
    the other need one gradient at a time.
    """
    are_ranked = all(_of_term(term, weights)[1] is not None for term in terms)
    if shuffles is not None or options.fixed_reference is not None or not (are_ranked or len(terms) == 1):
        return False
    if plan.name == "shared" and plan.chunk_size < batch.anchors:  # products wait for their mirror images
        return False
    if plan.kernel == "triton":
        return are_ranked
    few = _FEW.get(batch.image.device.type, _FEW_ELSEWHERE)
    return 2 * len(terms) * plan.chunk_size * len(batch.image) <= few


def _walk(
    terms: Sequence[Term],
    batch: Batch,
    options: RankOptions,
    plan: Plan,
    weights: Terms,
    shuffles: Tensor | None,
    values: Terms,
    sums: Inputs,
    *,
    at_once: bool,
) -> None:
    """Write the values and add the gradients of the rows of S and R, of I and X, or of S, X, I and R.

    In this order the first matrix is compared with the last, the second with the last but one, and lists of
    images and of texts alternate. The lists of a chunk of rows make one block if ``at_once``, else one by
    matrix.
    """
    pairs = [_pair(term, batch, plan, weights) for term in terms]
    matrices = _arranged([pair for pair, _ in pairs])
    references = _arranged([pair for _, pair in pairs if pair is not None])
    into = _arranged([_targets(term, batch, sums, options) for term in terms])
    with_gradient = any(x is not None for target in into for x in target)
    mirrored = plan.name == "shared" and not at_once
    products = (MirroredProducts if mirrored else Products)(matrices, options.precision, into)
    teacher = None
    if references and batch.has_teacher:
        kind = MirroredProducts if mirrored and plan.shares_reference else Products
        teacher = kind(references, options.precision)
    alphas = [_of_term(matrix.term, weights)[0] for matrix in matrices]
    betas = _ranking_weights(matrices, weights, options)
    count = len(matrices)
    step = count if at_once else 1
    first_equal = [_equal_items(references[k : k + step]) for k in range(0, count, step)]
    places = [_places(term, matrices[:step]) for term in terms]  # in every block alike
    for rows in slices(batch.anchors, plan.chunk_size):
        cosines = products.take(rows)
        ranked_by = cosines if teacher is None else teacher.take(rows)
        for k, equal in zip(range(0, count, step), first_equal, strict=True):
            mine = slice(k, k + step)
            beta = _by_list(betas[mine], rows)
            theirs = slice(count - k - step, count - k) if teacher is None else mine
            block = Block(
                cosines[mine].flatten(0, 1),
                batch.scale,
                _by_list(alphas[mine], rows),
                beta,
                None if beta is None else ranked_by[theirs].flatten(0, 1),
                None if beta is None else equal,
                batch.first_row + rows.start,
                None if shuffles is None else shuffles[MATRICES.index(matrices[k].name)],
                matrices=step,
                opposite=step > 1 and beta is not None and teacher is None,
            )
            size = len(block.cosines)
            whole = replace(plan, ranked_size=size, slice_size=size) if at_once else plan
            found = evaluate(block, options, whole, with_gradient=with_gradient)
            shares = 0.5, options.directions[k % 2]
            for term, place in zip(terms, places, strict=True):
                for value, part, share in zip(_of_term(term, values), found[:2], shares, strict=True):
                    if value is not None and part is not None:
                        part = part.unflatten(0, (step, -1))[place]
                        torch.mul(part, share, out=value[k : k + len(part), rows])
            products.give(mine, rows, cosines[mine], found.gradient)
            del found  # before the other matrices have a gradient


def _pair(
    term: Term, batch: Batch, plan: Plan, weights: Terms
) -> tuple[tuple[Matrix, Matrix], tuple[Matrix, Matrix] | None]:
    """The two matrices that a term compares, and what their lists are ranked by; None if by nothing."""
    is_ranked, in_kernel = _of_term(term, weights)[1] is not None, plan.kernel == "triton"
    matrices = batch.matrices(term, are_references=is_ranked and not batch.has_teacher, in_kernel=in_kernel)
    return matrices, batch.references(term, matrices, in_kernel=in_kernel) if is_ranked else None


def _arranged(pairs: Sequence[tuple[_T, _T]]) -> list[_T]:
    """What belongs to S and R, to I and X, or to S, X, I and R."""
    if len(pairs) < 2:
        return [x for pair in pairs for x in pair]
    (s, r), (i, x) = pairs
    return [s, x, i, r]


def _places(term: Term, matrices: Sequence[Matrix]) -> slice:
    """Where a term's matrices, one or two, are among these."""
    first, *others = (k for k, matrix in enumerate(matrices) if matrix.term == term)
    last = others[0] if others else first
    return slice(first, last + 1, max(last - first, 1))


def _equal_items(references: Sequence[Matrix]) -> Tensor | None:
    """The first equal items of one reference, ``[N]``, or of the two halves of several, ``[2, N]``."""
    found = [reference.first_equal for reference in references[:: max(len(references) - 1, 1)]]
    known = next((x for x in found if x is not None), None)
    if known is None or len(found) == 1:
        return known
    own = torch.arange(len(known), device=known.device) if any(x is None for x in found) else known
    return torch.stack([own if x is None else x for x in found])


def _ranking_weights(matrices: Sequence[Matrix], weights: Terms, options: RankOptions) -> list[Tensor | None]:
    """What the lists of every matrix weigh; None where they are not ranked."""
    found: list[Tensor | None] = []
    for matrix, share in zip(matrices, options.directions * 2, strict=False):
        weight = _of_term(matrix.term, weights)[1]
        if weight is None or share == 0:
            found.append(None)
        else:  # what one direction weighs, of the weight that each has where they share equally
            found.append(weight if share == 0.5 else weight * (2 * share))
    return found


def _by_list(weights: Sequence[Tensor | None], rows: slice) -> Tensor | None:
    """What the lists of some rows of all matrices weigh: ``[]`` if that is one value, else ``[lists, 1]``."""
    known = next((w for w in weights if w is not None), None)
    if known is None or (known.dim() == 0 and all(w is known for w in weights)):
        return known
    zero = known if all(w is not None for w in weights) else torch.zeros_like(known)
    stacked = torch.stack([zero if w is None else w for w in weights])
    if known.dim() == 0:
        return stacked.repeat_interleave(rows.stop - rows.start)[:, None]
    return stacked[:, rows].reshape(-1, 1)


def _targets(term: Term, batch: Batch, sums: Inputs, options: RankOptions) -> tuple[Target, Target]:
    scale = sums.scale if options.worth == "exp" else None  # the other worths do not depend on it
    first, second = anchors_and_items(term, sums, batch.image_anchors is not None)
    return Target(*first, scale), Target(*second, scale)
