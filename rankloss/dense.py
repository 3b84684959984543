"""The terms written plainly: whole similarity matrices, torch's own autograd, memory in O(N²).

This is the definition that the streaming pass is tested against. It also serves what cannot stream: batch
lists, which are one list of all N² pairs, and derivatives of second order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.bins import quantize
from rankloss.embeddings import Embeddings, Term, other_items, scores_from
from rankloss.options import RankOptions
from rankloss.plackett_luce import nll_terms, random_shuffle

__all__ = ["batch_list_nll", "row_lists_cross_entropy", "row_lists_nll"]


def row_lists_nll(
    embeddings: Embeddings,
    term: Term,
    options: RankOptions,
    shuffles: tuple[Tensor | None, Tensor | None] = (None, None),
    first_row: int = 0,
) -> Tensor:
    """NLL of every anchor's lists, the directions put together: ``[n]``.

    ``first_row`` is the first anchor's own place among the items.
    """
    lists = embeddings.lists(term)
    a, b = lists.first.cosines(), lists.second.cosines()
    a_reference, b_reference = lists.first.reference(a), lists.second.reference(b)
    value = a.new_zeros(len(a))
    for cosines, reference, shuffle, share in zip(
        (a, b), (b_reference, a_reference), shuffles, options.directions, strict=True
    ):
        if share == 0:
            continue
        scores = scores_from(cosines, embeddings.scale, options)
        if not options.diagonal:
            others = other_items(first_row + torch.arange(len(a), device=a.device), a.shape[-1])
            scores, reference = scores.gather(-1, others), reference.gather(-1, others)
        if options.bins_or_none is not None:
            reference = quantize(reference, options.bins)
        value = value + share * nll_terms(scores, reference, options, shuffle).sum(-1)
    return value


def row_lists_cross_entropy(embeddings: Embeddings, first_row: int = 0) -> Tensor:
    """Cross-entropy of every anchor with its own pair, averaged over the two directions: ``[n]``.

    ``first_row`` is the first anchor's own place among the items.
    """
    lists = embeddings.lists("cross_modal")
    own = first_row + torch.arange(embeddings.anchors, device=embeddings.image.device)
    a, b = (
        F.cross_entropy(embeddings.scale * similarity.cosines(), own, reduction="none")
        for similarity in (lists.first, lists.second)
    )
    return (a + b) / 2


def batch_list_nll(embeddings: Embeddings, term: Term, options: RankOptions) -> Tensor:
    """NLL of the one list of all N² pairs, the directions put together, split by anchor: ``[N]``.

    A pair's summand belongs to the anchor whose row it stands in, so the entries sum to the list's NLL.
    """
    lists = embeddings.lists(term)
    a = lists.first.cosines()
    if term == "cross_modal":
        # R is S transposed, so C(R | S) is C(S | R) with the pairs relabelled: summed by column, not by row.
        reference = lists.first.reference(a, canonical_anchors=True).T
        terms = _flat_terms(scores_from(a, embeddings.scale, options), reference, options)
        return options.directions[0] * terms.sum(1) + options.directions[1] * terms.sum(0)
    b = lists.second.cosines()
    value = a.new_zeros(len(a))
    directions = ((a, lists.second.symmetric_reference(b)), (b, lists.first.symmetric_reference(a)))
    for (cosines, reference), share in zip(directions, options.directions, strict=True):
        if share > 0:
            scores = scores_from(cosines, embeddings.scale, options)
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
