r"""The models of a graded list, each with the number of its terms.

A list has scores x and grades g, ``[n, K]``, in float64 on devices that have it; a larger grade is better.
Items of grade −∞ rank below all graded items and are not counted. Padding has the grade +∞. ``rest``,
``[n, M]``, has the scores of further items of grade −∞, or −∞ for an item outside the list.

Every model returns values and numbers of terms, both ``[n]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankloss.log_sums import log_cumsum_exp
from rankloss.pair_sums import pair_sums, rest_sums, softplus

LARGEST_INTEGER = 2**53
"""The largest integer up to which all are distinct in float64."""

LARGEST_INTEGERS = {torch.float64: "2⁵³", torch.float32: "2²⁴"}
"""The same by dtype, as it is written in errors."""


def is_rounded(grades: Tensor, dtype: torch.dtype) -> Tensor:
    """True for integers beyond those that are all distinct in a floating-point dtype; False for floats."""
    if grades.is_floating_point():
        return torch.zeros_like(grades, dtype=torch.bool)
    largest = round(2 / torch.finfo(dtype).eps)  # 2⁵³ in float64
    return (grades.long() > largest) | (grades.long() < -largest)


def plackett_luce(
    x: Tensor, grades: Tensor, rest: Tensor | None, *, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the order by grades; equal grades share one denominator.

    Terms are the graded items of rank ≤ ``top_k`` whose denominators include other items.
    """
    x, grades = _with_rest(x, grades, rest)
    grades, order = grades.sort(-1)  # ascending, so that {q : g_q ≤ g_p} is a prefix; padding comes last
    is_item = grades < math.inf
    x = x.gather(-1, order).masked_fill(~is_item, -math.inf)
    x = x - x.detach().amax(-1, keepdim=True)
    last_tied = torch.searchsorted(grades, grades, right=True) - 1
    log_denominators = log_cumsum_exp(x).gather(-1, last_tied)
    is_counted = is_item & (grades > -math.inf)
    if top_k is not None:
        best_rank = is_item.sum(-1, keepdim=True) - last_tied  # which tied items share
        is_counted &= best_rank <= top_k
    values = torch.where(is_counted, log_denominators - x, 0.0)
    has_other_items = last_tied > 0  # in its denominator
    return values.sum(-1), (is_counted & has_other_items).sum(-1)


def top_one(x: Tensor, grades: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy from softmax(g) to softmax(x): one term, none for a list of padding alone."""
    x, grades = _with_rest(x, grades, rest)
    is_item = grades < math.inf
    log_sum = x.masked_fill(~is_item, -math.inf).logsumexp(-1, keepdim=True)
    p = grades.masked_fill(~is_item, -math.inf).softmax(-1)
    p = p.nan_to_num(0.0)  # NaN without graded items
    values = (p * (log_sum - x)).sum(-1)
    terms = is_item.any(-1).long()
    return values, terms


def _with_rest(x: Tensor, grades: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lists with one more item, which has the score log Σ e^rest and the grade −∞; padding without a rest."""
    if rest is None:
        return x, grades
    is_empty = rest.detach().amax(-1, keepdim=True) == -math.inf
    # Scores of 0 stand for those of an empty rest, whose log Σ e^−∞ would have a derivative of NaN.
    score = rest.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True).to(x.dtype)
    grade = torch.full_like(score, -math.inf).masked_fill(is_empty, math.inf)
    x = torch.cat([x, score], -1)
    grades = torch.cat([grades, grade], -1)
    return x, grades


def pairwise(
    x: Tensor, grades: Tensor, rest: Tensor | None, *, by_difference: bool = False
) -> tuple[Tensor, Tensor]:
    """Σ −log σ(x_p − x_q) over the pairs with g_p > g_q, times g_p − g_q if ``by_difference``."""
    is_item = grades < math.inf
    is_graded = grades.abs() < math.inf
    n_worse = torch.searchsorted(grades.sort(-1).values, grades)  # for every item, how many are worse
    pairs = n_worse.where(is_item, 0).sum(-1)
    x = x if rest is None else x.to(rest.dtype)
    # Without differences, numbers of worse items stand for the grades: the same order, as finite integers.
    order = (grades if by_difference else n_worse).to(x.dtype)
    # Padding is in no pair: at −∞ it is better than no item, and with the largest number worse than none.
    order_of_better = order.masked_fill(~is_item, -math.inf)
    values = pair_sums(x, x, order_of_better, order, by_difference).to(grades.dtype).sum(-1)
    if rest is not None:  # every graded item is better than every item of the rest
        values = values + torch.where(is_graded, rest_sums(x, rest), 0.0).sum(-1)
        pairs = pairs + is_graded.sum(-1) * (rest > -math.inf).sum(-1)
    return values, pairs


def lambda_loss(
    x: Tensor, grades: Tensor, ranked_by: Tensor, *, gain: str = "linear", mu: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Σ −w_pq·log σ(x_p − x_q) over the pairs with g_p > g_q, with NDCG-Loss2++'s weights: one term.

    A list of padding alone has none.

    w_pq = (ρ_pq + μ·δ_pq)·(G_p − G_q) of the gains G over the ideal DCG. With ranks r, DCG's discount 1/D(r)
    and d = |r_p − r_q|, ρ_pq = |1/D(r_p) − 1/D(r_q)| and δ_pq = 1/D(d) − 1/D(d + 1). ``ranked_by`` has the
    scores x, equal for equal items. Items of equal scores share their mean rank, and for them d is 1.
    """
    is_item = grades < math.inf
    gains = _normalized_gains(grades.masked_fill(~is_item, 0.0), gain)
    scores = ranked_by.detach().masked_fill(~is_item, -math.inf)
    ranks = _mean_ranks(scores)
    rho = _differences(_discount(ranks)).abs()
    distances = _differences(ranks).abs().clamp_min(1.0)
    delta = _discount(distances) - _discount(distances + 1)
    weights = _differences(gains).clamp_min(0.0) * (rho + mu * delta)
    is_pair = (is_item[:, :, None] & is_item[:, None, :]) & (weights > 0)
    terms = weights * softplus(x[:, None, :] - x[:, :, None])
    values = torch.where(is_pair, terms, 0.0).sum((-1, -2))
    return values, is_item.any(-1).long()


def _differences(values: Tensor) -> Tensor:
    """``x_p − x_q`` of all pairs of a list: ``[n, K, K]``."""
    return values[:, :, None] - values[:, None, :]


def _mean_ranks(scores: Tensor) -> Tensor:
    """The rank of every item by its score, the best rank being 1; items of equal scores share their mean.

    Example:
        >>> _mean_ranks(torch.tensor([[3.0, 1.0, 2.0, 2.0]])).tolist()
        [[1.0, 4.0, 2.5, 2.5]]
    """
    others, items = scores[:, None, :], scores[:, :, None]
    above = (others > items).sum(-1, dtype=scores.dtype)
    equal = (others == items).sum(-1, dtype=scores.dtype)  # itself included
    return 0.5 + above + equal / 2


def _normalized_gains(grades: Tensor, gain: str) -> Tensor:
    """Gains over the ideal DCG, the largest that an order of the list reaches; 0 if it has no gain."""
    gains = relative_gains(grades, gain)
    ordered = gains.sort(-1, descending=True).values
    places = torch.arange(1, grades.shape[-1] + 1, dtype=grades.dtype, device=grades.device)
    ideal = (ordered * _discount(places)).sum(-1, keepdim=True)
    return gains / ideal.clamp_min(torch.finfo(ideal.dtype).tiny)


def relative_gains(grades: Tensor, gain: str) -> Tensor:
    """The gains g or 2^g − 1 of grades ≥ 0, the latter divided by the list's largest 2^g: finite for any g.

    Example:
        >>> relative_gains(torch.tensor([2000.0, 1999.0, 0.0]), "exponential").tolist()
        [1.0, 0.5, 0.0]
    """
    if gain == "linear":
        return grades
    # (2^g − 1) / 2^m = (1 − 2^−g)·2^(g − m), in which nothing overflows.
    largest = grades.amax(-1, keepdim=True)
    one_less_power = torch.expm1(math.log(2) * -grades).neg()
    return one_less_power * (grades - largest).exp2()


def _discount(rank: Tensor) -> Tensor:
    """DCG's discount of a rank, ``1 / log₂(1 + r)``."""
    return 1 / (1 + rank).log2()


def is_ranked(grades: Tensor, has_rest: Tensor | None) -> Tensor:
    """True if two items of the list have different grades: ``[n]``.

    Args:
        grades: ``[n, K]``.
        has_rest: ``[n]``, True for a list with items in its rest; None if no list has any.
    """
    is_padding = grades == math.inf
    best = grades.masked_fill(is_padding, -math.inf).amax(-1)
    worst = grades.amin(-1)
    if has_rest is not None:  # whose items have the grade −∞
        worst = worst.masked_fill(has_rest, -math.inf)
    return worst < best


def first_of_id(ids: Tensor, is_listed: Tensor | None = None) -> Tensor:
    """Index of the first item with the id of item i, a listed one if there is any, for every i: ``[M]``.

    Example:
        >>> first_of_id(torch.tensor([7, 3, 7]), torch.tensor([False, True, True])).tolist()
        [2, 1, 2]
    """
    if is_listed is None:
        is_listed = torch.ones_like(ids, dtype=torch.bool)
    listed_first = is_listed.byte().argsort(descending=True, stable=True)  # all items, the listed ones first
    ordered, order = ids[listed_first].sort(stable=True)  # stable: of one id the listed are still first
    place_in_ordered = torch.searchsorted(ordered, ids.contiguous())  # of the first with this id
    place_in_listed_first = order[place_in_ordered]
    return listed_first[place_in_listed_first]


def equal_scores(x: Tensor, items: Tensor) -> Tensor:
    """The scores of lists ``[n, K]``, for equal items that of the first: products may round them apart.

    ``items`` has a number of each item, ``[n, K]``, the same for equal ones.
    """
    is_equal = items[:, :, None] == items[:, None, :]
    first_equal = is_equal.byte().argmax(-1)  # the first of the largest values
    return x.gather(1, first_equal)


def others(listed: Tensor, first_equal: Tensor | None, is_listed: Tensor) -> Tensor:
    """Listed items that differ from all of a list's own items: ``[n, M]``.

    Args:
        listed: ``[n, K]``, the lists' own items.
        first_equal: ``[M]``, the first item equal to each; None if no two items are equal.
        is_listed: ``[M]``, True for items in any list.

    Returns:
        True for an item that is listed and none of the list's own.
    """
    own = listed if first_equal is None else first_equal[listed]
    is_own = torch.zeros(len(listed), len(is_listed), dtype=torch.bool, device=listed.device)
    is_own.scatter_(1, own, True)
    if first_equal is not None:
        is_own = is_own[:, first_equal]  # an item is the list's own if the first equal to it is
    return is_listed & ~is_own
