"""The terms written plainly: whole similarity matrices, torch's own autograd, memory in O(N²).

This is where a reader starts, and the definition that the streaming pass is tested against. It also serves
what cannot stream: batch lists, which are one list of all N² pairs, and derivatives of second order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import MATRICES, Batch, Matrix, Term, other_items
from rankloss.likelihood import list_terms, scores_from
from rankloss.options import RankOptions
from rankloss.ranking import random_shuffle

__all__ = ["batch_list_nll", "row_lists_cross_entropy", "row_lists_nll"]


def row_lists_nll(batch: Batch, term: Term, options: RankOptions, shuffles: Tensor | None = None) -> Tensor:
    """NLL of every anchor's lists, the directions put together: ``[n]``.

    ``shuffles``, ``[4, N]``, are those of the lists of S, R, I and X under ``ties="random"``. With
    ``reduction="mean"`` each list's NLL is divided by its Σ_p μ_p.
    """
    value = batch.image.new_zeros(batch.anchors)
    for (matrix, cosines, ranked_by), share in zip(_sides(batch, term), options.directions, strict=True):
        if share == 0:
            continue
        scores = scores_from(cosines, batch.scale, options)
        reference = ranked_by[0].reference(ranked_by[1])
        if not options.diagonal:
            others = other_items(batch.own, scores.shape[-1])
            scores, reference = scores.gather(-1, others), reference.gather(-1, others)
        shuffle = None if shuffles is None else shuffles[MATRICES.index(matrix.name)]
        value = value + share * list_terms(scores, reference, batch.scale, options, shuffle).sum(-1)
    return value


def _sides(batch: Batch, term: Term) -> list[tuple[Matrix, Tensor, tuple[Matrix, Tensor]]]:
    """The two matrices of a term with their cosines, each with what its lists are ranked by."""
    matrices = batch.matrices(term)
    references = batch.references(term, matrices)
    cosines = [m.cosines() for m in matrices]
    of_references = [m.cosines() for m in references] if batch.has_teacher else cosines[::-1]
    return list(zip(matrices, cosines, zip(references, of_references, strict=True), strict=True))


def row_lists_cross_entropy(batch: Batch) -> Tensor:
    """Cross-entropy of every anchor with its own pair, averaged over the two directions: ``[n]``."""
    a, b = (
        F.cross_entropy(batch.scale * matrix.cosines(), batch.own, reduction="none")
        for matrix in batch.matrices("cross_modal")
    )
    return (a + b) / 2


def batch_list_nll(batch: Batch, term: Term, options: RankOptions) -> Tensor:
    """NLL of the one list of all N² pairs, the directions put together, split by anchor: ``[N]``.

    A pair's summand belongs to the anchor whose row it stands in, so the entries sum to the list's NLL, which
    with ``reduction="mean"`` is divided by its Σ_p μ_p.
    """
    if term == "cross_modal":
        matrices = batch.matrices(term)
        a = matrices[0].cosines()
        by_first, by_second = batch.references(term, matrices)
        reference = by_first.reference(by_first.cosines() if batch.has_teacher else a.T)
        if by_second.first_equal is not None:  # here equal anchors tie as well
            reference = reference[by_second.first_equal]
        terms = _flat_terms(a, reference, batch, options)
        # The matrices of the texts are those of the images transposed, so the other direction's list holds
        # the same pairs relabelled: it is summed by column, not by row.
        return options.directions[0] * terms.sum(1) + options.directions[1] * terms.sum(0)
    value = batch.image.new_zeros(batch.anchors)
    for (_, cosines, (matrix, of_matrix)), share in zip(_sides(batch, term), options.directions, strict=True):
        if share > 0:
            # An order needs its structural ties; top_one compares values, which are to stay what they are.
            is_order = options.model == "plackett_luce"
            reference = matrix.symmetric_reference(of_matrix) if is_order else of_matrix.detach()
            value = value + share * _flat_terms(cosines, reference, batch, options).sum(1)
    return value


def _flat_terms(cosines: Tensor, reference: Tensor, batch: Batch, options: RankOptions) -> Tensor:
    scores = scores_from(cosines, batch.scale, options)
    n, shuffle = len(scores), random_shuffle(scores.numel(), scores.device, options)
    others = None if options.diagonal else other_items(torch.arange(n, device=scores.device), n)
    x, y = (m if others is None else m.gather(-1, others) for m in (scores, reference))
    terms = list_terms(x.flatten(), y.flatten(), batch.scale, options, shuffle).view_as(x)
    return terms if others is None else torch.zeros_like(scores).scatter(-1, others, terms)
