r"""The definition: one list, and the terms from whole similarity matrices, by torch's own autograd.

Start reading here; the streamed pass is tested against this module. For scores x and a reference y that gives
the order,

    NLL(x | y) = Σ_p μ_p · [ log Σ_{q : y_q ≤ y_p} e^{x_q} − x_p ],

with μ_p = 1 where the rank of p counts and 0 elsewhere, as plain differentiable operations on x, so that no
sum underflows at any distance of the scores. Memory is O(N²). The pass uses the module for what it does not
compute itself: second derivatives, and a value per anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import RANK_TERMS, Batch, Term, other_items
from rankloss.log_sums import log_cumsum_exp
from rankloss.options import RankOptions
from rankloss.ranking import quantize

# --- one list ---------------------------------------------------------------------------------------------


def nll_terms(scores: Tensor, reference: Tensor, options: RankOptions) -> Tensor:
    """The summands of the NLL, item by item, in the items' own order: ``[..., N]``, differentiable.

    Args:
        scores: ``[..., N]``, float32 or float64.
        reference: ``[..., N]``, any real dtype.
        options: of the lists. With ``reduction="mean"`` the terms of a list are divided by the number of
            counted items.
    """
    # A NaN in the reference has no place in the order, so the list's value is NaN.
    nan_factor: Tensor | None = None
    if reference.is_floating_point():
        nan_factor = torch.where(reference.isnan().any(-1, keepdim=True), math.nan, 1.0).to(scores.dtype)
    if options.method == "bin":
        reference = quantize(reference, options.bins)
    n = scores.shape[-1]
    ordered, order = reference.sort(dim=-1)  # ascending, so that {q : y_q ≤ y_p} is a prefix
    last = _last_of_ties(ordered)
    ranked = scores.gather(-1, order)
    log_denominators = log_cumsum_exp(ranked).gather(-1, last)
    terms = log_denominators - ranked
    n_counted: Tensor | int = n
    if options.top_k is not None:
        best_rank = n - last  # which tied items share
        is_counted = (best_rank <= options.top_k).to(scores.dtype)
        terms = terms * is_counted
        n_counted = is_counted.sum(-1, keepdim=True)
    if options.reduction == "mean":
        terms = terms / n_counted
    in_own_order = torch.empty_like(terms).scatter(-1, order, terms)
    if nan_factor is None:
        return in_own_order
    return in_own_order * nan_factor  # a product, so that the gradient is NaN, too


def _last_of_ties(ordered: Tensor) -> Tensor:
    """The last index of each position's run of equal values, in sorted lists."""
    n = ordered.shape[-1]
    is_last = F.pad(ordered[..., 1:] != ordered[..., :-1], (0, 1), value=True)
    last_or_n = torch.where(is_last, torch.arange(n, device=ordered.device), n)
    from_the_end = last_or_n.flip(-1)
    return from_the_end.cummin(-1).values.flip(-1)  # of each place the next one that ends a run


def top_one_probabilities(reference: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The p = softmax(y) of lists of cosines, without gradient; y is ``scale`` times the cosines.

    ``options.reference_scale``, where given, takes the place of ``scale``.
    """
    reference = reference.detach()
    factor = scale.detach() if options.reference_scale is None else options.reference_scale
    # Subtract first: the difference is exact near the largest value, where a product's rounding would matter.
    return (factor * (reference - reference.amax(-1, keepdim=True))).softmax(-1)


# --- the terms of a batch ---------------------------------------------------------------------------------


def terms(batch: Batch, options: RankOptions, weights: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight; zero if not wanted.

    Scalars, but ``[n]`` with ``reduction="none"``.
    """
    is_per_anchor = options.reduction == "none"
    names: list[Term | Literal["contrastive"]] = ["contrastive", *RANK_TERMS]
    values = []
    for name, is_wanted, weight in zip(names, wanted, weights.unbind(), strict=True):
        if not is_wanted:
            values.append(batch.inputs.image.new_zeros(batch.anchors if is_per_anchor else ()))
            continue
        if name == "contrastive":
            by_anchor = cross_entropy(batch) / batch.anchors
        else:
            share = options.anchor_weight(batch.anchors, batch.items)
            by_anchor = share * rank_term(batch, name, options)
        by_anchor = by_anchor * weight.to(by_anchor.dtype)
        values.append(by_anchor if is_per_anchor else by_anchor.sum())
    return values


def cross_entropy(batch: Batch) -> Tensor:
    """Cross-entropy of every anchor with its own pair, averaged over the two directions: ``[n]``."""
    by_direction = []
    for matrix in batch.matrices("cross_modal"):
        logits = batch.inputs.scale * matrix.cosines()
        by_direction.append(F.cross_entropy(logits, batch.positives, reduction="none"))
    return (by_direction[0] + by_direction[1]) / 2


def rank_term(batch: Batch, term: Term, options: RankOptions) -> Tensor:
    """A rank term of every anchor, averaged over the two directions: ``[n]``.

    With ``reduction="mean"`` each list's NLL is divided by the number of its counted items.
    """
    references = batch.references(term)
    cosines = [matrix.cosines() for matrix in batch.matrices(term)]
    if batch.teacher is None:  # each matrix ranks the other
        reference_cosines = cosines[::-1]
    else:
        reference_cosines = [matrix.cosines() for matrix in references]
    value: Tensor = batch.inputs.image.new_zeros(batch.anchors)
    for direction, share in enumerate(options.directions):
        if share == 0:
            continue
        y = batch.exact_reference(references[direction], reference_cosines[direction])
        summands = list_terms(cosines[direction], y, batch.inputs.scale, batch.positives, options)
        value = value + share * summands.sum(-1)
    return value


def list_terms(
    cosines: Tensor, reference: Tensor, scale: Tensor, own: Tensor, options: RankOptions
) -> Tensor:
    """The summands of C(x | y), item by item, of lists of cosines.

    Args:
        cosines: c, ``[n, N]``; x = s·c.
        reference: y, ``[n, N]``.
        scale: s.
        own: ``[n]``, the column of each list's own pair.
        options: of the lists.

    Returns:
        ``[n, N]``, or ``[n, N − 1]`` without the own pairs.
    """
    if not options.diagonal:
        others = other_items(own, cosines.shape[-1])
        cosines = cosines.gather(-1, others)
        reference = reference.gather(-1, others)
    scores = scale * cosines
    if options.model == "top_one":
        p = top_one_probabilities(reference, scale, options)
        terms: Tensor = p * (scores.logsumexp(-1, keepdim=True) - scores)
        return terms
    return nll_terms(scores, reference, options)
