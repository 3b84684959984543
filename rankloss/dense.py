r"""The definition: one list, and the terms from whole similarity matrices, by torch's own autograd.

Start reading here; the streamed pass is tested against this module. For scores x, a reference y that gives
the order, and a positive worth w(x),

    NLL(x | y) = Σ_p μ_p · [ log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p) ],

as plain differentiable operations on log w(x), so that no sum underflows at any distance of the scores.
Memory is O(N²). The module also computes the options that do not stream: batch lists (one list of all N²
pairs), worths other than ``exp``, random ties, rank discounts, a value per anchor, and second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import RANK_TERMS, Batch, Matrix, Term, other_items
from rankloss.log_sums import log_cumsum_exp
from rankloss.options import RankOptions, Worth
from rankloss.ranking import quantize

_UNIT = 0.01  # distance of a row's norm from 1 up to which it counts as unit-norm


# --- one list ---------------------------------------------------------------------------------------------


def nll_terms(scores: Tensor, reference: Tensor, options: RankOptions) -> Tensor:
    """The summands of the NLL, item by item, in the items' own order: ``[..., N]``, differentiable.

    Args:
        scores: ``[..., N]``, float32 or float64.
        reference: ``[..., N]``, any real dtype.
        options: of the lists. With ``reduction="mean"`` the terms of a list are divided by its Σ_p μ_p. With
            ``ties="random"`` all lists of the call share one shuffle, from torch's default generator.

    """
    # A NaN in the reference has no place in the order, so the list's value is NaN.
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
    terms = log_cumsum_exp(ranked).gather(-1, last) - ranked
    mu = _mu(n - last, options, scores.dtype)  # tied items share their best rank
    if mu is not None:
        terms = terms * mu
    if options.reduction == "mean":
        terms = terms / (n if mu is None else mu.sum(-1, keepdim=True))
    terms = torch.empty_like(terms).scatter(-1, order, terms)
    return terms if ordered_or_nan is None else terms * ordered_or_nan  # by a product, for a NaN gradient


def _last_of_ties(ordered: Tensor) -> Tensor:
    """The last index of each position's run of equal values, in sorted lists."""
    n = ordered.shape[-1]
    is_last = F.pad(ordered[..., 1:] != ordered[..., :-1], (0, 1), value=True)
    index = torch.where(is_last, torch.arange(n, device=ordered.device), n)
    return index.flip(-1).cummin(-1).values.flip(-1)


def _mu(rank: Tensor, options: RankOptions, dtype: torch.dtype) -> Tensor | None:
    """The μ of items of these ranks, the best rank being 1; None if all μ are 1."""
    if options.discount is None and options.top_k is None:
        return None
    rank = rank.to(dtype)
    mu = torch.ones_like(rank) if options.discount is None else rank.log1p().reciprocal()
    return mu if options.top_k is None else torch.where(rank <= options.top_k, mu, 0)


def log_worth(scores: Tensor, worth: Worth) -> Tensor:
    """The log w(x); if w(x) is not positive, a ValueError with the smallest score, or NaN.

    The error is raised on a CPU, where reading the scores is free. The value is NaN on other devices, and if
    a score is already infinite.
    """
    if worth == "exp":
        return scores
    floor = -1.0 if worth == "shifted" else 0.0
    values = scores.detach()
    if values.is_cpu:
        smallest = values.amin()
        if bool(smallest <= floor) and bool(values.isfinite().all()):
            raise ValueError(
                f"worth={worth!r} needs scores above {floor:g}, where their logarithm exists; "
                f"the smallest is {smallest.item():g}"
            )
    scores = scores.masked_fill(values <= floor, math.nan)
    return scores.log1p() - math.log(2) if worth == "shifted" else scores.log()


def top_one_probabilities(reference: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The p = softmax(y) of lists of cosines, without gradient; y has the given scale or the reference's."""
    reference = reference.detach()
    factor = scale.detach() if options.reference_scale is None else options.reference_scale
    # Subtract first: the difference is exact near the largest value, where a product's rounding would matter.
    return (factor * (reference - reference.amax(-1, keepdim=True))).softmax(-1)


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
    share = 1.0 if options.lists == "batch" else options.anchor_weight(batch.anchors, batch.items)
    values = []
    for term, is_wanted, weight in zip((None, *RANK_TERMS), wanted, weights.unbind(), strict=True):
        if not is_wanted:
            values.append(batch.inputs.image.new_zeros(batch.anchors if per_anchor else ()))
            continue
        if term is None:
            by_anchor = cross_entropy(batch) / batch.anchors
        else:
            by_anchor = share * rank_term(batch, term, options)
        by_anchor = by_anchor * weight.to(by_anchor.dtype)
        values.append(by_anchor if per_anchor else by_anchor.sum())
    return values


def cross_entropy(batch: Batch) -> Tensor:
    """Cross-entropy of every anchor with its own pair, averaged over the two directions: ``[n]``."""
    a, b = (
        F.cross_entropy(batch.inputs.scale * matrix.cosines(), batch.positives, reduction="none")
        for matrix in batch.matrices("cross_modal")
    )
    return (a + b) / 2


def rank_term(batch: Batch, term: Term, options: RankOptions) -> Tensor:
    """A rank term of every anchor, averaged over the two directions: ``[n]``.

    With ``reduction="mean"`` each list's NLL is divided by its Σ_p μ_p. A summand of a batch list belongs to
    the anchor of its row.
    """
    if options.lists == "batch" and term == "cross_modal":
        return _cross_modal_of_all_pairs(batch, options)
    references = batch.references(term)
    cosines = [matrix.cosines() for matrix in batch.matrices(term)]
    ranked_by = cosines[::-1]
    if batch.teacher is not None:
        ranked_by = [matrix.cosines() for matrix in references]
    value: Tensor = batch.inputs.image.new_zeros(batch.anchors)
    for c, reference, y, share in zip(cosines, references, ranked_by, options.directions, strict=True):
        if share == 0:
            continue
        if options.lists == "row":
            summands = _row_terms(c, batch.exact_reference(reference, y), batch, options)
        else:
            # An order needs its structural ties; top_one compares values, which must not change.
            is_order = options.model == "plackett_luce"
            y = _symmetric_reference(batch, reference, y) if is_order else y.detach()
            summands = _flat_terms(c, y, batch, options)
        value = value + share * summands.sum(-1)
    return value


def _row_terms(cosines: Tensor, reference: Tensor, batch: Batch, options: RankOptions) -> Tensor:
    if not options.diagonal:
        others = other_items(batch.positives, cosines.shape[-1])
        cosines = cosines.gather(-1, others)
        reference = reference.gather(-1, others)
    return _list_terms(cosines, reference, batch.inputs.scale, options)


def _symmetric_reference(batch: Batch, matrix: Matrix, cosines: Tensor) -> Tensor:
    """The whole matrix I or X as the reference of a batch list, with exact structural ties.

    C_ij = C_ji is taken from the upper triangle. The similarity of two equal items, or of an item with
    itself, is the square of their norm, computed separately from the matrix product. Rows whose norm is
    within 1 % of 1 count as unit-norm: all of them share one value, the largest of their squares.
    """
    upper = cosines.detach().triu()
    reference = upper + upper.triu(1).T
    equal = batch.first_equal[matrix.factors[1]]
    if equal is None:
        equal = torch.arange(len(matrix.items), device=upper.device)
    reference = reference[equal][:, equal]
    squares = matrix.items.detach().square().sum(-1)[equal]
    is_unit = (squares.sqrt() - 1).abs() <= _UNIT
    unit = squares.where(is_unit, 0.0).amax()
    squares = torch.where(is_unit, unit, squares)
    return torch.where(equal[:, None] == equal, squares[:, None], reference)


def _cross_modal_of_all_pairs(batch: Batch, options: RankOptions) -> Tensor:
    of_images, _ = batch.matrices("cross_modal")
    by_first, by_second = batch.references("cross_modal")
    cosines = of_images.cosines()
    ranked_by = cosines.T if batch.teacher is None else by_first.cosines()
    reference = batch.exact_reference(by_first, ranked_by)
    equal = batch.first_equal[by_second.factors[1]]
    if equal is not None:  # here equal anchors tie as well
        reference = reference[equal]
    terms = _flat_terms(cosines, reference, batch, options)
    # R is S transposed: the list of the other direction has the same pairs relabelled, and is summed by
    # column.
    return options.directions[0] * terms.sum(1) + options.directions[1] * terms.sum(0)


def _flat_terms(cosines: Tensor, reference: Tensor, batch: Batch, options: RankOptions) -> Tensor:
    """The summands of the one list of all pairs, in their places."""
    scale = batch.inputs.scale
    if options.diagonal:
        return _list_terms(cosines.flatten(), reference.flatten(), scale, options).view_as(cosines)
    others = other_items(batch.positives, len(cosines))
    x = cosines.gather(-1, others).flatten()
    y = reference.gather(-1, others).flatten()
    terms = _list_terms(x, y, scale, options).view_as(others)
    return torch.zeros_like(cosines).scatter(-1, others, terms)
