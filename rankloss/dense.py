"""The terms written plainly: whole similarity matrices, torch's own autograd, memory in O(N²).

This is the definition that the streaming pass is tested against. It also serves what cannot stream: batch
lists, which are one list of all N² pairs, and derivatives of second order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.bins import quantize
from rankloss.embeddings import Embeddings, Term, scores_from
from rankloss.plackett_luce import ListOptions, nll_terms, random_shuffle

__all__ = ["batch_list_nll", "row_lists_cross_entropy", "row_lists_nll"]


def row_lists_nll(
    embeddings: Embeddings,
    term: Term,
    options: ListOptions,
    shuffles: tuple[Tensor | None, Tensor | None] = (None, None),
    bins: int | None = None,
) -> Tensor:
    """NLL of every anchor's lists, averaged over the two directions: ``[n]``."""
    lists = embeddings.lists(term)
    a, b = lists.first.cosines(), lists.second.cosines()
    a_scores, b_scores = (scores_from(x, embeddings.scale, options) for x in (a, b))
    a_reference, b_reference = lists.first.reference(a), lists.second.reference(b)
    if bins is not None:
        a_reference, b_reference = quantize(a_reference, bins), quantize(b_reference, bins)
    a_terms = nll_terms(a_scores, b_reference, options, shuffles[0])
    b_terms = nll_terms(b_scores, a_reference, options, shuffles[1])
    return (a_terms.sum(-1) + b_terms.sum(-1)) / 2


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


def batch_list_nll(embeddings: Embeddings, term: Term, options: ListOptions) -> Tensor:
    """NLL of the one list of all N² pairs, averaged over the two directions and split by anchor: ``[N]``.

    A pair's summand belongs to the anchor whose row it stands in, so the entries sum to the list's NLL.
    """
    lists = embeddings.lists(term)
    a = lists.first.cosines()
    a_scores = scores_from(a, embeddings.scale, options)
    if term == "cross_modal":
        # R is S transposed, so C(R | S) is C(S | R) with the pairs relabelled: summed by column, not by row.
        a_terms = _flat_terms(a_scores, lists.first.reference(a, canonical_anchors=True).T, options)
        return (a_terms.sum(0) + a_terms.sum(1)) / 2
    b = lists.second.cosines()
    b_scores = scores_from(b, embeddings.scale, options)
    a_terms = _flat_terms(a_scores, lists.second.symmetric_reference(b), options)
    b_terms = _flat_terms(b_scores, lists.first.symmetric_reference(a), options)
    return (a_terms.sum(1) + b_terms.sum(1)) / 2


def _flat_terms(scores: Tensor, reference: Tensor, options: ListOptions) -> Tensor:
    shuffle = random_shuffle(scores.numel(), scores.device, options)
    return nll_terms(scores.flatten(), reference.flatten(), options, shuffle).view_as(scores)
