r"""Metrics of graded lists: Kendall's τ, Spearman's ρ, nDCG, accuracy of pairs, reciprocal rank.

Functions take ``[..., N]`` and return ``[...]``, one value per list; ``mask``, of the same shape, is False at
padding. Lists of two shapes, of complex numbers, or of integers beyond 2⁵³, which float64 rounds, are a
ValueError.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rankloss import graded
from rankloss.checks import check_is_tensor
from rankloss.options import check_choice, check_count
from rankloss.precision import widest_dtype


def kendall_tau(
    x: Tensor, y: Tensor, *, variant: Literal["b", "c"] = "b", mask: Tensor | None = None
) -> Tensor:
    r"""Kendall's τ of every pair of lists.

        τ_b = (P − Q) / √((P + Q + X₀)(P + Q + Y₀)),   τ_c = 2(P − Q) / (n²·(m − 1)/m)

    with P concordant and Q discordant pairs of items, X₀ and Y₀ the pairs tied only in x and only in y, n the
    number of items and m the smaller number of distinct values of x and y. Computed in O(N log² N) by
    counting inversions while merging.

    Args:
        x: ``[..., N]``.
        y: ``[..., N]``.
        variant: ``"b"`` or ``"c"``, for x and y with different numbers of possible values.
        mask: ``[..., N]``.

    Returns:
        ``[...]``, float64; NaN where all items of a list are tied, or one is NaN.

    References:
        "A Computer Method for Calculating Kendall's Tau with Ungrouped Data", 1966; "The Estimation and
        Comparison of Strengths of Association in Contingency Tables", 1953 (τ_c).

    Example:
        >>> kendall_tau(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])).item()
        0.6666666666666666
    """
    check_choice("variant", variant, ("b", "c"))
    counts = _concordance(x, y, mask)
    if variant == "b":
        return counts.agreement / (counts.unequal_x * counts.unequal_y).sqrt()
    n = x.shape[-1] if mask is None else mask.sum(-1).to(counts.agreement.dtype)
    m = counts.distinct
    return 2 * counts.agreement / (n**2 * (m - 1) / m)


def pairwise_accuracy(scores: Tensor, grades: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Share of the pairs with unequal grades that scores and grades order alike.

    A pair of equal scores counts one half.

    Args:
        scores: ``[..., N]``.
        grades: ``[..., N]``, larger is better.
        mask: ``[..., N]``.

    Returns:
        ``[...]``, float64; NaN if all grades are equal, or an entry is NaN.

    Example:
        >>> pairwise_accuracy(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.0])).item()
        0.6666666666666666
    """
    counts = _concordance(scores, grades, mask)
    return (1 + counts.agreement / counts.unequal_y) / 2


def ndcg(
    scores: Tensor,
    grades: Tensor,
    *,
    k: int | None = None,
    gain: Literal["linear", "exponential"] = "linear",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Normalised discounted cumulative gain of the first k ranks.

        DCG = Σ_{r ≤ k} gain(g_r) / log2(1 + r),   nDCG = DCG / DCG of the order by grades

    Items with equal scores share the mean of their ranks' discounts, as in scikit-learn.

    Args:
        scores: ``[..., N]``.
        grades: ``[..., N]``, at least 0; an item of grade −∞ is unranked and has the gain 0.
        k: the number of ranks; None for all.
        gain: ``"linear"``: g; ``"exponential"``: 2^g − 1.
        mask: ``[..., N]``.

    Returns:
        ``[...]``, float64; NaN if no item has a gain, or an entry is NaN.

    Raises:
        ValueError: for a finite grade below 0, whose gain would be negative.

    Example:
        >>> ndcg(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0])).item()  # 1 / log₂ 3
        0.6309297535714575
    """
    check_choice("gain", gain, ("linear", "exponential"))
    (scores, grades), is_nan = _checked_lists(mask, scores=scores, grades=grades)
    if ((grades < 0) & (grades > -math.inf)).any():
        raise ValueError(f"grades must be at least 0, or −infinity; got {grades[grades > -math.inf].min():g}")
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    discounts = places.add(1).to(grades.dtype).log2().reciprocal()
    if k is not None:
        discounts = discounts.where(places <= check_count("k", k), 0.0)
    gains = graded.relative_gains(grades.clamp_min(0.0), gain)
    dcg = _dcg(gains, discounts, _padding_last(scores, mask))
    ideal_dcg = _dcg(gains, discounts, _padding_last(grades, mask))
    return torch.where(is_nan, math.nan, dcg / ideal_dcg)


def _dcg(gains: Tensor, discounts: Tensor, ranked_by: Tensor) -> Tensor:
    """``Σ gain·discount`` of lists; items that are tied share the mean discount of their ranks.

    Args:
        gains: ``[..., N]``.
        discounts: ``[N]``, of the ranks, best first.
        ranked_by: ``[..., N]``, larger is better.
    """
    sums_of_first = torch.nn.functional.pad(discounts.cumsum(0), (1, 0))  # [r]: of the first r ranks
    below, ties = smaller_and_equal(ranked_by)
    last_rank = ranked_by.shape[-1] - below
    sums_of_tied = sums_of_first[last_rank] - sums_of_first[last_rank - ties - 1]
    return (gains * sums_of_tied / (ties + 1)).sum(-1)


def reciprocal_rank(
    scores: Tensor, grades: Tensor, *, at_least: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """1 / rank of the first relevant item; the mean over lists is MRR.

    Irrelevant items with the same score rank before it.

    Args:
        scores: ``[..., N]``.
        grades: ``[..., N]``.
        at_least: the smallest grade of a relevant item.
        mask: ``[..., N]``.

    Returns:
        ``[...]``, float64; NaN if no item is relevant, or an entry is NaN.

    Example:
        >>> reciprocal_rank(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 1.0])).item()
        0.5
    """
    (scores, grades), is_nan = _checked_lists(mask, scores=scores, grades=grades)
    is_relevant = grades >= at_least
    best = scores.masked_fill(~is_relevant, -math.inf).amax(-1, keepdim=True)
    is_before = (scores >= best) & ~is_relevant
    if mask is not None:
        is_before = is_before & mask
    rank = 1 + is_before.sum(-1).to(scores.dtype)
    has_no_rank = is_nan | ~is_relevant.any(-1)
    return torch.where(has_no_rank, math.nan, 1 / rank)


def spearman_rho(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's ρ of every pair of lists: Pearson's correlation of the ranks.

    Tied items share their mean rank.

    Args:
        x: ``[..., N]``.
        y: ``[..., N]``.

    Returns:
        ``[...]``, float64; NaN where all items of a list are tied, or one is NaN.

    Example:
        >>> spearman_rho(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])).item()
        0.8
    """
    (x, y), is_nan = _checked_lists(None, x=x, y=y)
    a = _centred_ranks(x)
    b = _centred_ranks(y)
    covariance = (a * b).sum(-1)
    variances = a.square().sum(-1) * b.square().sum(-1)
    return torch.where(is_nan, math.nan, covariance / variances.sqrt())


def _centred_ranks(x: Tensor) -> Tensor:
    """The ranks of the items, of tied ones their mean rank, less the mean of the list."""
    below, ties = smaller_and_equal(x)
    ranks = below.to(x.dtype) + ties.to(x.dtype) / 2
    return ranks - ranks.mean(-1, keepdim=True)


def _checked_lists(mask: Tensor | None, **lists: Tensor) -> tuple[list[Tensor], Tensor]:
    """Two lists in float64 if the device has it, −∞ at padding, and True for lists with NaN: ``[...]``."""
    (first, x), (second, y) = lists.items()
    check_is_tensor(first, x)
    check_is_tensor(second, y)
    if x.shape != y.shape or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{first} and {second} must have one shape [..., N]; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if mask is not None:
        check_is_tensor("mask", mask)
        if mask.shape != x.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(x.shape)}; got {mask.dtype} {tuple(mask.shape)}"
            )
    x, y = _in_widest_dtype(first, x, mask), _in_widest_dtype(second, y, mask)
    has_nan = (x.isnan() | y.isnan()).any(-1)
    return [x, y], has_nan


def _in_widest_dtype(name: str, numbers: Tensor, mask: Tensor | None) -> Tensor:
    """A list in float64 if the device has it, −∞ at padding; an error names one that it cannot hold."""
    if numbers.is_complex() or numbers.dtype == torch.uint64:
        # Torch would drop the imaginary part; the check below takes integers as int64, in which uint64 wraps.
        raise ValueError(
            f"{name} must hold floating-point numbers, or integers up to int64; got {numbers.dtype}"
        )
    dtype = widest_dtype(numbers.device)
    is_rounded = graded.is_rounded(numbers, dtype)
    if mask is not None:
        is_rounded = is_rounded & mask
    if not numbers.is_floating_point() and bool(is_rounded.any()):
        raise ValueError(
            f"{name} must be at most {graded.LARGEST_INTEGERS[dtype]}, to stay distinct in {dtype}; got "
            f"{numbers[is_rounded][0].item()}"
        )
    widened = numbers.detach().to(dtype)
    return widened if mask is None else widened.masked_fill(~mask, -math.inf)


def _padding_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """Numbers in the order of x; padding is below every item, also one of −∞."""
    if mask is None:
        return x
    below, _ = smaller_and_equal(x)
    return below.add(1).masked_fill(~mask, 0)


class _Concordance(NamedTuple):
    """Counts of the pairs of items of lists x and y, ``[...]`` each.

    Attributes:
        agreement: P − Q, the concordant pairs less the discordant ones; NaN for a list with NaN.
        unequal_x: the pairs that are not tied in x.
        unequal_y: the pairs that are not tied in y.
        distinct: the smaller number of distinct values of x and of y.
    """

    agreement: Tensor
    unequal_x: Tensor
    unequal_y: Tensor
    distinct: Tensor


def _concordance(x: Tensor, y: Tensor, mask: Tensor | None) -> _Concordance:
    """The counts of lists ``[..., N]``, in O(N log² N): a sort, and inversions counted while merging."""
    (x, y), is_nan = _checked_lists(mask, x=x, y=y)
    n = x.shape[-1]
    x_below, x_ties = smaller_and_equal(_padding_last(x, mask))
    y_below, y_ties = smaller_and_equal(_padding_last(y, mask))
    both = x_below * n + y_below  # one number per item, in the order of x, and of y where x is tied
    _, both_ties = smaller_and_equal(both)
    y_in_order_of_x = both.sort(dim=-1).values % n  # leaves y_below, which is less than n
    discordant = _inversions(y_in_order_of_x)
    # Pairs, of which each is in the ties of two items. Counts are integers: float32 has not all of them.
    x_tied = x_ties.sum(-1) // 2
    y_tied = y_ties.sum(-1) // 2
    both_tied = both_ties.sum(-1) // 2
    is_item = torch.ones_like(both, dtype=torch.bool) if mask is None else mask
    # Each item is concordant with all padding; pairs of padding are tied.
    pairs = n * (n - 1) // 2 - is_item.sum(-1) * (~is_item).sum(-1)
    agreement = (pairs - x_tied - y_tied + both_tied - 2 * discordant).to(x.dtype)
    agreement = torch.where(is_nan, math.nan, agreement)
    # Distinct values are counted by 1/k for each of k equal ones.
    x_distinct = (is_item / (x_ties + 1.0)).sum(-1).round()
    y_distinct = (is_item / (y_ties + 1.0)).sum(-1).round()
    return _Concordance(
        agreement,
        unequal_x=(pairs - x_tied).to(x.dtype),
        unequal_y=(pairs - y_tied).to(x.dtype),
        distinct=torch.minimum(x_distinct, y_distinct).to(x.dtype),
    )


def smaller_and_equal(x: Tensor) -> tuple[Tensor, Tensor]:
    """For every item, the number of smaller items of its list, and of other items equal to it."""
    x = x.contiguous()
    ordered = x.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, x)
    not_above = torch.searchsorted(ordered, x, right=True)
    return below, not_above - below - 1


def _inversions(x: Tensor) -> Tensor:
    """Pairs of positions i < j with x_i > x_j, for non-negative integers x of ``[..., N]``."""
    n = x.shape[-1]
    power_of_two = 1 << (n - 1).bit_length()  # the least that is not below n
    padding = power_of_two - n
    x = torch.nn.functional.pad(x, (0, padding), value=n)  # larger than all, and last: no inversion
    count = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
    width = 1
    while width < x.shape[-1]:
        halves = x.unflatten(-1, (-1, 2, width))
        left = halves[..., 0, :].contiguous()
        right = halves[..., 1, :].contiguous()
        larger = width - torch.searchsorted(left, right, right=True)  # on the left, of each on the right
        # Not in place: under vmap the count has fewer dimensions than the summand.
        count = count + larger.sum((-1, -2))
        x = halves.flatten(-2).sort(dim=-1).values.flatten(-2)
        width *= 2
    return count
