r"""C(x | y) of one list by definition, in log space: Plackett–Luce's negative log-likelihood, and top-one.

For scores x, a reference y that gives the order, and a positive worth w(x),

    NLL(x | y) = Σ_p μ_p · [ log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p) ].

These are plain differentiable operations on ℓ = log w(x): no sum underflows however far apart the scores are,
and autograd differentiates them any number of times. Under ``model="top_one"`` the summands are

    p_q · [ log Σ_r e^{x_r} − x_q ],   p = softmax(y).

:mod:`rankloss.lists` computes the same faster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankloss.options import RankOptions, Worth
from rankloss.precision import may_look_at
from rankloss.ranking import group_bounds, quantize, shuffled_order, weights_of_ranks

__all__ = [
    "list_terms",
    "log_worth",
    "log_worth_slope",
    "nll_terms",
    "scores_from",
    "top_one_probabilities",
]


def list_terms(
    scores: Tensor, reference: Tensor, scale: Tensor, options: RankOptions, shuffle: Tensor | None
) -> Tensor:
    """The summands of C(x | y), item by item, under the options' model: ``[..., N]``, differentiable.

    The scores are those of :func:`scores_from`; the reference holds cosines, which ``scale`` multiplies where
    values count.
    """
    if options.model == "top_one":
        p = top_one_probabilities(reference, scale, options)
        return p * (scores.logsumexp(-1, keepdim=True) - scores)
    return nll_terms(scores, reference, options, shuffle)


def top_one_probabilities(reference: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The p = softmax(y) of lists of cosines, without gradient; y is on the given scale or its own."""
    reference = reference.detach()
    factor = scale.detach() if options.reference_scale is None else options.reference_scale
    # The difference first: it is exact near the largest, where a product's rounding would count.
    return (factor * (reference - reference.amax(-1, keepdim=True))).softmax(-1)


def nll_terms(scores: Tensor, reference: Tensor, options: RankOptions, shuffle: Tensor | None) -> Tensor:
    """The summands of the NLL, item by item, in the items' own order: ``[..., N]``, differentiable.

    Args:
        scores: ``[..., N]``, float32 or float64.
        reference: ``[..., N]``, any real dtype.
        options: of the lists. With ``reduction="mean"`` the terms of a list are divided by its Σ_p μ_p.
        shuffle: ``[N]`` under ``ties="random"``: tied items come in the order of the shuffle; else None.
    """
    # A NaN in the reference has no place in the order, so the list has no value.
    ordered_or_nan: Tensor | None = None
    if reference.is_floating_point():
        ordered_or_nan = torch.where(reference.isnan().any(-1, keepdim=True), math.nan, 1.0).to(scores.dtype)
    if options.bins_or_none is not None:
        reference = quantize(reference, options.bins)
    n = scores.shape[-1]
    if shuffle is None:
        ordered, order = reference.sort(dim=-1)  # ascending, so that {q : y_q ≤ y_p} is a prefix
        _, last = group_bounds(ordered)
    else:
        order = shuffled_order(reference, shuffle)
        last = torch.arange(n, device=scores.device).expand(order.shape)
    ranked = log_worth(scores, options.worth).gather(-1, order)
    terms = torch.logcumsumexp(ranked, -1).gather(-1, last) - ranked
    mu = weights_of_ranks(n - last, options, scores.dtype)  # tied items share their best rank
    if mu is not None:
        # Selected, not multiplied by 0: the second derivative of logcumsumexp is NaN where its upstream is 0.
        terms = torch.where(mu > 0, terms * mu, 0)
    if options.reduction == "mean":
        terms = terms / (n if mu is None else mu.sum(-1, keepdim=True))
    terms = torch.empty_like(terms).scatter(-1, order, terms)
    return terms if ordered_or_nan is None else terms * ordered_or_nan  # by a product, for a NaN gradient


def scores_from(cosines: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The x of the formula: scaled similarities under worth ``exp``, plain cosines under the others."""
    return scale * cosines if options.worth == "exp" else cosines


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


def log_worth_slope(scores: Tensor, worth: Worth) -> Tensor | None:
    """The derivative of log w(x), or None where it is 1."""
    if worth == "exp":
        return None
    return (1 + scores if worth == "shifted" else scores).reciprocal()
