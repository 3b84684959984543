r"""The definition: one list, and the terms from whole similarity matrices, by torch's own autograd.

This is where a reader starts, and what the streaming pass is tested against. For scores x, a reference y that
gives the order, and a positive worth w(x),

    NLL(x | y) = Σ_p μ_p · [ log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p) ],

as plain differentiable operations on log w(x): no sum underflows however far apart the scores are. Memory is
in O(N²). It also serves what does not stream: batch lists, which are one list of all N² pairs, other worths
than ``exp``, random ties, rank discounts, a value per anchor, and derivatives of second order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import RANK_TERMS, Batch, Term, matrices_of, other_items
from rankloss.checks import refuse_forward_mode
from rankloss.lists import top_one_probabilities
from rankloss.options import RankOptions, Worth
from rankloss.precision import may_look_at
from rankloss.ranking import quantize

_COPIES = 12  # of a matrix, in float32 and as indices, that the definition holds for its backward pass
# Asked for once: a compiler cannot trace it.
_HOST_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


# --- one list ---------------------------------------------------------------------------------------------


def nll_terms(scores: Tensor, reference: Tensor, options: RankOptions) -> Tensor:
    """The summands of the NLL, item by item, in the items' own order: ``[..., N]``, differentiable.

    Args:
        scores: ``[..., N]``, float32 or float64.
        reference: ``[..., N]``, any real dtype.
        options: of the lists. With ``reduction="mean"`` the terms of a list are divided by its Σ_p μ_p. With
            ``ties="random"`` one shuffle, of torch's default generator, serves all lists of the call.

    Raises:
        RuntimeError: in forward-mode differentiation.
    """
    # torch's forward mode of logcumsumexp loses all precision where scores span many nats.
    refuse_forward_mode(scores)
    # A NaN in the reference has no place in the order, so the list has no value.
    ordered_or_nan: Tensor | None = None
    if reference.is_floating_point():
        ordered_or_nan = torch.where(reference.isnan().any(-1, keepdim=True), math.nan, 1.0).to(scores.dtype)
    if options.method == "bin":
        reference = quantize(reference, options.bins)
    n = scores.shape[-1]
    if options.ties == "shared":
        ordered, order = reference.sort(dim=-1)  # ascending, so that {q : y_q ≤ y_p} is a prefix
        last = _last_of_ties(ordered)
    else:
        shuffle = torch.randperm(n, device=scores.device)
        order = shuffle[reference[..., shuffle].argsort(dim=-1, stable=True)]
        last = torch.arange(n, device=scores.device).expand(order.shape)
    ranked = log_worth(scores, options.worth).gather(-1, order)
    terms = torch.logcumsumexp(ranked, -1).gather(-1, last) - ranked
    mu = _mu(n - last, options, scores.dtype)  # tied items share their best rank
    if mu is not None:
        # Selected, not multiplied by 0: the second derivative of logcumsumexp is NaN where its upstream is 0.
        terms = torch.where(mu > 0, terms * mu, 0)
    if options.reduction == "mean":
        terms = terms / (n if mu is None else mu.sum(-1, keepdim=True))
    terms = torch.empty_like(terms).scatter(-1, order, terms)
    return terms if ordered_or_nan is None else terms * ordered_or_nan  # by a product, for a NaN gradient


def _last_of_ties(ordered: Tensor) -> Tensor:
    """The last index of the run of equal values that holds each position, of sorted lists."""
    n = ordered.shape[-1]
    is_last = F.pad(ordered[..., 1:] != ordered[..., :-1], (0, 1), value=True)
    index = torch.where(is_last, torch.arange(n, device=ordered.device), n)
    return index.flip(-1).cummin(-1).values.flip(-1)


def _mu(rank: Tensor, options: RankOptions, dtype: torch.dtype) -> Tensor | None:
    """The μ of items of these ranks, the best rank being 1; None where all are 1."""
    if options.discount is None and options.top_k is None:
        return None
    rank = rank.to(dtype)
    mu = torch.ones_like(rank) if options.discount is None else rank.log1p().reciprocal()
    return mu if options.top_k is None else torch.where(rank <= options.top_k, mu, 0)


def log_worth(scores: Tensor, worth: Worth) -> Tensor:
    """The log w(x); where w(x) is not positive, a ValueError with the smallest score, or NaN.

    It is the error where a look at the scores is free, which is on a CPU outside a compiler, and NaN
    elsewhere, or where a score is infinite already.
    """
    if worth == "exp":
        return scores
    floor = -1.0 if worth == "shifted" else 0.0
    values = scores.detach()
    if may_look_at(values):
        smallest = values.amin()
        if bool(smallest <= floor) and bool(values.isfinite().all()):
            raise ValueError(
                f"worth={worth!r} needs scores above {floor:g}, where their logarithm exists; "
                f"the smallest is {smallest.item():g}"
            )
    scores = scores.masked_fill(values <= floor, math.nan)
    return scores.log1p() - math.log(2) if worth == "shifted" else scores.log()


def _list_terms(cosines: Tensor, reference: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The summands of C(x | y), item by item, under the options' model, of lists of cosines: ``[..., N]``."""
    scores = scale * cosines if options.worth == "exp" else cosines
    if options.model == "top_one":
        p = top_one_probabilities(reference, scale, options)
        return p * (scores.logsumexp(-1, keepdim=True) - scores)
    return nll_terms(scores, reference, options)


# --- the terms of a batch ---------------------------------------------------------------------------------


def terms(batch: Batch, options: RankOptions, weights: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight; zero if not wanted.

    Scalars, but ``[n]`` with ``reduction="none"``.
    """
    per_anchor = options.reduction == "none"
    share = 1.0 if options.lists == "batch" else options.anchor_weight(batch.anchors, len(batch.image))
    values = []
    for term, is_wanted, weight in zip((None, *RANK_TERMS), wanted, weights.unbind(), strict=True):
        if not is_wanted:
            values.append(batch.image.new_zeros(batch.anchors if per_anchor else ()))
            continue
        value = (
            cross_entropy(batch) / batch.anchors if term is None else share * rank_term(batch, term, options)
        )
        value = value * weight.to(value.dtype)
        values.append(value if per_anchor else value.sum())
    return values


def cross_entropy(batch: Batch) -> Tensor:
    """Cross-entropy of every anchor with its own pair, averaged over the two directions: ``[n]``."""
    a, b = (
        F.cross_entropy(batch.scale * matrix.cosines(), batch.positives, reduction="none")
        for matrix in batch.matrices(matrices_of("cross_modal"))
    )
    return (a + b) / 2


def rank_term(batch: Batch, term: Term, options: RankOptions) -> Tensor:
    """A rank term of every anchor, the directions put together: ``[n]``.

    With ``reduction="mean"`` each list's NLL is divided by its Σ_p μ_p. A summand of a batch list belongs to
    the anchor whose row it stands in.
    """
    if options.lists == "batch" and term == "cross_modal":
        return _cross_modal_of_all_pairs(batch, options)
    names = matrices_of(term)
    matrices, references = batch.matrices(names), batch.references(names)
    cosines = [matrix.cosines() for matrix in matrices]
    ranked_by = [matrix.cosines() for matrix in references] if batch.has_teacher else cosines[::-1]
    value = batch.image.new_zeros(batch.anchors)
    for matrix, c, reference, y in zip(matrices, cosines, references, ranked_by, strict=True):
        share = options.directions[0 if matrix.name in "SI" else 1]
        if share == 0:
            continue
        if options.lists == "row":
            summands = _row_terms(c, batch.exact_reference(reference, y), batch, options)
        else:
            # An order needs its structural ties; top_one compares values, which are to stay what they are.
            is_order = options.model == "plackett_luce"
            y = batch.symmetric_reference(reference, y) if is_order else y.detach()
            summands = _flat_terms(c, y, batch, options)
        value = value + share * summands.sum(-1)
    return value


def _row_terms(cosines: Tensor, reference: Tensor, batch: Batch, options: RankOptions) -> Tensor:
    if not options.diagonal:
        others = other_items(batch.positives, cosines.shape[-1])
        cosines, reference = cosines.gather(-1, others), reference.gather(-1, others)
    return _list_terms(cosines, reference, batch.scale, options)


def _cross_modal_of_all_pairs(batch: Batch, options: RankOptions) -> Tensor:
    names = matrices_of("cross_modal")
    (images, _), (by_first, by_second) = batch.matrices(names), batch.references(names)
    cosines = images.cosines()
    reference = batch.exact_reference(by_first, by_first.cosines() if batch.has_teacher else cosines.T)
    equal = batch.first_equal(by_second)
    if equal is not None:  # here equal anchors tie as well
        reference = reference[equal]
    terms = _flat_terms(cosines, reference, batch, options)
    # R is S transposed: the other direction's list holds the same pairs relabelled: it is summed by
    # column.
    return options.directions[0] * terms.sum(1) + options.directions[1] * terms.sum(0)


def _flat_terms(cosines: Tensor, reference: Tensor, batch: Batch, options: RankOptions) -> Tensor:
    """The summands of the one list of all pairs, where they stand."""
    others = None if options.diagonal else other_items(batch.positives, len(cosines))
    x, y = (m if others is None else m.gather(-1, others) for m in (cosines, reference))
    terms = _list_terms(x.flatten(), y.flatten(), batch.scale, options).view_as(x)
    return terms if others is None else torch.zeros_like(cosines).scatter(-1, others, terms)


def check_memory(batch: Batch, options: RankOptions) -> None:
    """Raise a ValueError where the whole matrices would not fit into the device's memory."""
    n, items, device = batch.anchors, len(batch.image), batch.image.device
    if torch.compiler.is_compiling():  # a compiler cannot ask the system
        return
    if device.type == "cpu":
        total = _HOST_BYTES
    elif device.type == "cuda" and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        return
    needed = _COPIES * n * items * batch.image.dtype.itemsize
    if needed > total:
        raise ValueError(
            f"{options!r} needs whole matrices of {n:,} × {items:,}, about {needed / 2**30:,.0f} GiB, and "
            f"{device} has {total / 2**30:,.0f} GiB. Memory is linear in the batch for row lists of worth "
            "'exp' with shared ties, without discount and reduction='none'"
        )
