r"""Metrics of an embedding space and of graded lists. Nothing here is differentiated.

Functions of features take unit-norm ``[N, D]``; image row i and text row i are a pair. Functions of lists
take ``[..., N]`` and return ``[...]``, one value per list; ``mask``, of the same shape, is False at padding.
Integers beyond 2⁵³ are refused, since float64 rounds them.

Values are float64. On a device without it, such as MPS, they are float32; integers are at most 2²⁴ there.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rankloss import graded
from rankloss.batch import first_occurrence
from rankloss.checks import check_features, check_is_tensor
from rankloss.options import check_choice, check_count
from rankloss.precision import widest_dtype

__all__ = [
    "alignment",
    "kendall_tau",
    "modality_gap",
    "ndcg",
    "pairwise_accuracy",
    "rank_agreement",
    "reciprocal_rank",
    "spearman_rho",
    "uniformity",
]

_BLOCK = 2**20  # elements of a chunk's similarity matrix


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
    agreement, unequal_x, unequal_y, distinct = _concordance(x, y, mask)
    if variant == "b":
        return agreement / (unequal_x * unequal_y).sqrt()
    n = x.shape[-1] if mask is None else mask.sum(-1).to(agreement.dtype)
    return 2 * agreement / (n**2 * (distinct - 1) / distinct)


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
    agreement, _, unequal_grades, _ = _concordance(scores, grades, mask)
    return (1 + agreement / unequal_grades) / 2


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
    # Discounts of the first r ranks; tied items share the discounts of their ranks.
    cumulated = torch.nn.functional.pad(discounts.cumsum(0), (1, 0))
    gains = graded.relative_gains(grades.clamp_min(0.0), gain)

    def dcg(x: Tensor) -> Tensor:
        below, ties = smaller_and_equal(_padding_last(x, mask))
        last = x.shape[-1] - below
        return (gains * (cumulated[last] - cumulated[last - ties - 1]) / (ties + 1)).sum(-1)

    return torch.where(is_nan, math.nan, dcg(scores) / dcg(grades))


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
    before = (is_before if mask is None else is_before & mask).sum(-1)
    return torch.where(is_nan | ~is_relevant.any(-1), math.nan, 1 / (1 + before.to(scores.dtype)))


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
    lists, is_nan = _checked_lists(None, x=x, y=y)
    dtype = lists[0].dtype
    a, b = (below.to(dtype) + ties.to(dtype) / 2 for below, ties in map(smaller_and_equal, lists))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    rho = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(is_nan, math.nan, rho)


@torch.no_grad()
def rank_agreement(
    image_features: Tensor, text_features: Tensor, *, max_anchors: int | None = None
) -> dict[str, Tensor]:
    """Agreement between an image's ranking and its text's, averaged over pairs: Kendall's τ-b, Spearman's ρ.

    ``cross_modal_*`` compares row i of S = V·Tᵀ with row i of R = Sᵀ, ``in_modal_*`` row i of I = V·Vᵀ with
    row i of X = T·Tᵀ. Equal items are tied exactly, as in the losses. A row with all items tied has no
    ranking and is left out of the average.

    Args:
        image_features: ``[N, D]``.
        text_features: ``[N, D]``.
        max_anchors: number of evenly spaced rows to compare; all rows by default.

    Returns:
        ``cross_modal_tau``, ``cross_modal_rho``, ``in_modal_tau``, ``in_modal_rho``: scalars in [−1, 1].

    Raises:
        ValueError: for features that are not two matrices of one shape, or ``max_anchors`` < 1.

    Example:
        >>> v = torch.eye(3)
        >>> rank_agreement(v, v)["in_modal_tau"].item()
        1.0
    """
    v, t = checked_pair(image_features, text_features)
    n = len(v)
    count = n if max_anchors is None else min(n, check_count("max_anchors", max_anchors))
    equal_v, equal_t = first_occurrence(v), first_occurrence(t)
    anchors = torch.linspace(0, n - 1, count, dtype=v.dtype, device=v.device).round().long()
    measures = {"tau": kendall_tau, "rho": spearman_rho}
    values: dict[str, list[Tensor]] = {
        f"{term}_{m}": [] for term in ("cross_modal", "in_modal") for m in measures
    }
    for rows in anchors.split(max(1, _BLOCK // n)):
        of_v, of_t = v[rows], t[rows]
        terms = {
            "cross_modal": ((of_v @ t.T)[:, equal_t], (of_t @ v.T)[:, equal_v]),
            "in_modal": ((of_v @ v.T)[:, equal_v], (of_t @ t.T)[:, equal_t]),
        }
        for term, (a, b) in terms.items():
            for name, measure in measures.items():
                values[f"{term}_{name}"].append(measure(a, b))
    finite = bool(v.isfinite().all() & t.isfinite().all())
    return {k: torch.cat(x).nanmean() if finite else x[0].new_tensor(math.nan) for k, x in values.items()}


def modality_gap(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``‖mean_i v_i − mean_i t_i‖``: the distance between the centres of the modalities.

    References:
        "Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive Representation Learning",
        NeurIPS 2022.

    Example:
        >>> round(modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        1.4142
    """
    v, t = checked_pair(image_features, text_features)
    return (v.mean(0) - t.mean(0)).square().sum().sqrt()


def alignment(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``mean_i ‖v_i − t_i‖²``: 0 if every pair coincides; smaller is better.

    References:
        "Understanding Contrastive Representation Learning through Alignment and Uniformity
        on the Hypersphere", ICML 2020.

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
        2.0
    """
    v, t = checked_pair(image_features, text_features)
    return (v - t).square().sum(-1).mean()


def uniformity(image_features: Tensor, text_features: Tensor | None = None) -> Tensor:
    """``log mean_{i > j} exp(−2‖x_i − z_j‖²)``: evenness of the sphere's coverage; smaller is more even.

    With one argument x and z are the same features: the uniformity of one modality. With two arguments x are
    the images and z the texts: the cross-modal measure of the CyCLIP authors' analysis.

    Args:
        image_features: ``[N, D]``, N ≥ 2.
        text_features: ``[N, D]`` or None.

    References:
        As :func:`alignment`; for two modalities "CyCLIP: Cyclic Contrastive Language-Image Pretraining",
        NeurIPS 2022.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item()
        -8.0
    """
    x, z = checked_pair(image_features, image_features if text_features is None else text_features, 2)
    n = len(x)
    sums = []
    for start in range(0, n, max(1, _BLOCK // n)):
        rows = x[start : start + max(1, _BLOCK // n)]
        squared = rows.square().sum(-1, keepdim=True) + z.square().sum(-1) - 2 * rows @ z.T
        earlier = torch.ones_like(squared, dtype=torch.bool).tril(start - 1)
        sums.append((-2 * squared).masked_fill(~earlier, -math.inf).flatten().logsumexp(0))
    finite = x.isfinite().all() & z.isfinite().all()
    value = torch.stack(sums).logsumexp(0) - math.log(n * (n - 1) / 2)
    return torch.where(finite, value, math.nan)


def checked_pair(image_features: Tensor, text_features: Tensor, min_pairs: int = 1) -> tuple[Tensor, Tensor]:
    """The features in float64 if the device has it, without a graph.

    Raises:
        TypeError, ValueError: as :func:`rankloss.checks.check_features`.
    """
    check_features(image_features, text_features, min_pairs=min_pairs)
    dtype = widest_dtype(image_features.device)
    return image_features.detach().to(dtype), text_features.detach().to(dtype)


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
    dtype = widest_dtype(x.device)
    checked = []
    for name, z in lists.items():
        if z.is_complex() or z.dtype == torch.uint64:  # torch would drop the imaginary part, and wrap
            raise ValueError(
                f"{name} must hold floating-point numbers, or integers up to int64; got {z.dtype}"
            )
        is_rounded = graded.is_rounded(z, dtype) if mask is None else graded.is_rounded(z, dtype) & mask
        if not z.is_floating_point() and bool(is_rounded.any()):
            raise ValueError(
                f"{name} must be at most {graded.LARGEST_INTEGERS[dtype]}, to stay distinct in {dtype}; got "
                f"{z[is_rounded][0].item()}"
            )
        z = z.detach().to(dtype)
        checked.append(z if mask is None else z.masked_fill(~mask, -math.inf))
    return checked, (checked[0].isnan() | checked[1].isnan()).any(-1)


def _padding_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """Numbers in the order of x; padding is below every item, also one of −∞."""
    return x if mask is None else smaller_and_equal(x)[0].add(1).masked_fill(~mask, 0)


def _concordance(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P − Q, the pairs not tied in x, those not tied in y, and the smaller number of distinct values."""
    lists, is_nan = _checked_lists(mask, x=x, y=y)
    n, dtype = x.shape[-1], lists[0].dtype
    (x_below, x_ties), (y_below, y_ties) = (smaller_and_equal(_padding_last(z, mask)) for z in lists)
    both = x_below * n + y_below
    x_tied, y_tied, both_tied = (ties.sum(-1) // 2 for ties in (x_ties, y_ties, smaller_and_equal(both)[1]))
    discordant = _inversions(both.sort(dim=-1).values % n)
    is_item = torch.ones_like(both, dtype=torch.bool) if mask is None else mask
    # Each item is concordant with all padding; pairs of padding are tied. Counts are integers: float32 has
    # not all of them.
    pairs = n * (n - 1) // 2 - is_item.sum(-1) * (~is_item).sum(-1)
    agreement = (pairs - x_tied - y_tied + both_tied - 2 * discordant).to(dtype)
    distinct = torch.minimum(*((is_item / (ties + 1.0)).sum(-1).round() for ties in (x_ties, y_ties)))
    agreement = torch.where(is_nan, math.nan, agreement)
    return agreement, (pairs - x_tied).to(dtype), (pairs - y_tied).to(dtype), distinct.to(dtype)


def smaller_and_equal(x: Tensor) -> tuple[Tensor, Tensor]:
    """For every item, the number of smaller items of its list, and of other items equal to it."""
    ordered = x.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, x.contiguous())
    return below, torch.searchsorted(ordered, x.contiguous(), right=True) - below - 1


def _inversions(x: Tensor) -> Tensor:
    """Pairs of positions i < j with x_i > x_j, for non-negative integers x of ``[..., N]``."""
    n = x.shape[-1]
    padding = (1 << (n - 1).bit_length()) - n
    x = torch.nn.functional.pad(x, (0, padding), value=n)  # larger than all, and last: no inversion
    count = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
    width = 1
    while width < x.shape[-1]:
        halves = x.unflatten(-1, (-1, 2, width))
        left, right = halves[..., 0, :].contiguous(), halves[..., 1, :].contiguous()
        # Not in place: under vmap the count has fewer dimensions than the summand.
        count = count + (width - torch.searchsorted(left, right, right=True)).sum((-1, -2))
        x = halves.flatten(-2).sort(dim=-1).values.flatten(-2)
        width *= 2
    return count
