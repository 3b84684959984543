r"""Metrics of an embedding space: rank agreement, modality gap, alignment, uniformity.

Functions take unit-norm ``[N, D]``; image row i and text row i are a pair.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from rankloss.batch import first_occurrence
from rankloss.checks import check_features
from rankloss.metrics.lists import kendall_tau, spearman_rho
from rankloss.options import check_count
from rankloss.precision import widest_dtype

_BLOCK = 2**20  # elements of a chunk's similarity matrix


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
        ``cross_modal_tau``, ``cross_modal_rho``, ``in_modal_tau``, ``in_modal_rho``: scalars in [−1, 1]; NaN
        if a feature is not finite, or if no row has a ranking.

    Raises:
        ValueError: for features that are not two matrices of one shape, or ``max_anchors`` < 1.

    Example:
        >>> v = torch.eye(3)
        >>> rank_agreement(v, v)["in_modal_tau"].item()
        1.0
    """
    v, t = _checked_pair(image_features, text_features)
    n = len(v)
    count = n if max_anchors is None else min(n, check_count("max_anchors", max_anchors))
    anchors = torch.linspace(0, n - 1, count, dtype=v.dtype, device=v.device).round().long()
    # A product's rounding depends on the place of an item, so equal items would not be tied: each takes the
    # similarity of the first item that equals it.
    first_v, first_t = first_occurrence(v), first_occurrence(t)
    values: defaultdict[str, list[Tensor]] = defaultdict(list)
    for rows in anchors.split(max(1, _BLOCK // n)):
        cross_modal = (v[rows] @ t.T)[:, first_t], (t[rows] @ v.T)[:, first_v]  # rows of S and of R
        in_modal = (v[rows] @ v.T)[:, first_v], (t[rows] @ t.T)[:, first_t]  # rows of I and of X
        values["cross_modal_tau"].append(kendall_tau(*cross_modal))
        values["cross_modal_rho"].append(spearman_rho(*cross_modal))
        values["in_modal_tau"].append(kendall_tau(*in_modal))
        values["in_modal_rho"].append(spearman_rho(*in_modal))
    means = {name: torch.cat(of_blocks).nanmean() for name, of_blocks in values.items()}
    are_finite = bool(v.isfinite().all() & t.isfinite().all())
    if not are_finite:
        return {name: torch.full_like(mean, math.nan) for name, mean in means.items()}
    return means


def modality_gap(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``‖mean_i v_i − mean_i t_i‖``: the distance between the centres of the modalities.

    References:
        "Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive Representation Learning",
        NeurIPS 2022.

    Example:
        >>> round(modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        1.4142
    """
    v, t = _checked_pair(image_features, text_features)
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
    v, t = _checked_pair(image_features, text_features)
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
    if text_features is None:
        text_features = image_features
    x, z = _checked_pair(image_features, text_features, 2)
    n = len(x)
    rows_at_once = max(1, _BLOCK // n)
    log_sums = []
    for start in range(0, n, rows_at_once):
        rows = x[start : start + rows_at_once]
        squared_distances = rows.square().sum(-1, keepdim=True) + z.square().sum(-1) - 2 * rows @ z.T
        is_counted = torch.ones_like(squared_distances, dtype=torch.bool).tril(start - 1)  # where i > j
        exponents = (-2 * squared_distances).masked_fill(~is_counted, -math.inf)
        log_sums.append(exponents.flatten().logsumexp(0))
    pairs = n * (n - 1) / 2
    value = torch.stack(log_sums).logsumexp(0) - math.log(pairs)
    is_finite = x.isfinite().all() & z.isfinite().all()
    return torch.where(is_finite, value, math.nan)


def _checked_pair(image_features: Tensor, text_features: Tensor, min_pairs: int = 1) -> tuple[Tensor, Tensor]:
    """The features in float64 if the device has it, without a graph.

    Raises:
        TypeError, ValueError: as :func:`rankloss.checks.check_features`.
    """
    check_features(image_features, text_features, min_pairs=min_pairs)
    dtype = widest_dtype(image_features.device)
    return image_features.detach().to(dtype), text_features.detach().to(dtype)
