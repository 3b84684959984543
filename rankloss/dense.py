"""The terms written plainly: whole similarity matrices, torch's own autograd, memory in O(N²).

This is where a reader starts, and the definition that the streaming pass is tested against. It also serves
what cannot stream: batch lists, which are one list of all N² pairs, and derivatives of second order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import MATRICES, Batch, Term, other_items
from rankloss.likelihood import nll_terms, scores_from
from rankloss.options import RankOptions
from rankloss.ranking import random_shuffle

__all__ = ["batch_list_nll", "row_lists_cross_entropy", "row_lists_nll"]


def row_lists_nll(batch: Batch, term: Term, options: RankOptions, shuffles: Tensor | None = None) -> Tensor:
    """NLL of every anchor's lists, the directions put together: ``[n]``.

    ``shuffles``, ``[4, N]``, are those of the lists of S, R, I and X under ``ties="random"``. With
    ``reduction="mean"`` each list's NLL is divided by its Σ_p μ_p.
    """
    first, second = batch.matrices(term)
    a, b = first.cosines(), second.cosines()
    directions = ((first, a, second.reference(b)), (second, b, first.reference(a)))
    value = a.new_zeros(len(a))
    for (matrix, cosines, reference), share in zip(directions, options.directions, strict=True):
        if share == 0:
            continue
        scores = scores_from(cosines, batch.scale, options)
        if not options.diagonal:
            others = other_items(batch.own, a.shape[-1])
            scores, reference = scores.gather(-1, others), reference.gather(-1, others)
        shuffle = None if shuffles is None else shuffles[MATRICES.index(matrix.name)]
        value = value + share * nll_terms(scores, reference, options, shuffle).sum(-1)
    return value


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
    first, second = batch.matrices(term)
    a = first.cosines()
    if term == "cross_modal":
        # R is S transposed, so C(R | S) is C(S | R) with the pairs relabelled: summed by column, not by row.
        reference = first.reference(a)
        if second.first_equal is not None:  # here equal anchors tie as well
            reference = reference[second.first_equal]
        terms = _flat_terms(scores_from(a, batch.scale, options), reference.T, options)
        return options.directions[0] * terms.sum(1) + options.directions[1] * terms.sum(0)
    b = second.cosines()
    value = a.new_zeros(len(a))
    directions = ((a, second.symmetric_reference(b)), (b, first.symmetric_reference(a)))
    for (cosines, reference), share in zip(directions, options.directions, strict=True):
        if share > 0:
            scores = scores_from(cosines, batch.scale, options)
            value = value + share * _flat_terms(scores, reference, options).sum(1)
    return value


def _flat_terms(scores: Tensor, reference: Tensor, options: RankOptions) -> Tensor:
    shuffle = random_shuffle(scores.numel(), scores.device, options)
    if options.diagonal:
        return nll_terms(scores.flatten(), reference.flatten(), options, shuffle).view_as(scores)
    n = len(scores)
    others = other_items(torch.arange(n, device=scores.device), n)
    terms = nll_terms(
        scores.gather(-1, others).flatten(), reference.gather(-1, others).flatten(), options, shuffle
    )
    return torch.zeros_like(scores).scatter(-1, others, terms.view_as(others))
