r"""The spread of a modality: the standard deviation of each item's similarities with the other items.

With x_i the N rows of X in the whole batch, m their mean and C = (1/N) Σ_j (x_j − m)(x_j − m)ᵀ,

    τ(X) = (1/N) Σ_i √(Var_{j≠i}(x_i·x_j) + ε),
    Var_{j≠i}(x_i·x_j) = N/(N−1) · x_i·r_i,   r_i = C·x_i − [x_i·(x_i − m)] / (N−1) · (x_i − m),

so N·D + D² numbers are held instead of N². r_i is C·x_i without item i's own part. It is subtracted before
the last product with x_i, where it loses the fewest digits. ∂Var/∂x_i, with the other items fixed, is
2N/(N−1) · r_i.

A batch of at most D items has the smaller matrix of similarities, N × N. It is then computed directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloss.distributed import Gather
from rankloss.precision import product

EPSILON = 1e-9
"""ε, added to a variance of cosines so that its root has a gradient where all similarities are equal."""


def spread(features: Tensor, gather: Gather, dtype: torch.dtype) -> Tensor:
    """τ: the mean standard deviation of an item's cosines with the other items, over a modality's items.

    With ``gather.local_loss`` it is the mean over this process's items, else over all items.

    Args:
        features: ``[n, D]``, this process's.
        gather: the gathering of other processes' items.
        dtype: of the arithmetic and of the result.
    """
    items = len(features) * gather.place.world_size
    if items <= features.shape[1]:
        variances = _of_similarities(features, gather, dtype)
    else:
        variances = _of_covariance(features, gather, dtype)
        if not gather.anchors_are_local:  # of all items, as the similarities' are
            variances = gather.items(variances)
    return (variances.clamp_min(0) + EPSILON).sqrt().mean()  # rounding may leave a variance below 0


def _of_similarities(features: Tensor, gather: Gather, dtype: torch.dtype) -> Tensor:
    """The variances from the matrix of the similarities: of this process's rows, or of all."""
    items = gather.items(features).to(dtype)
    anchors = features.to(dtype) if gather.anchors_are_local else items
    centred = items - items.mean(0)
    similarities = product(anchors, centred.T)
    rows = torch.arange(len(anchors), device=items.device) + gather.first_row(len(features))
    is_own = rows[:, None] == torch.arange(len(items), device=items.device)
    others = len(items) - 1
    mean = similarities.masked_fill(is_own, 0).sum(-1, keepdim=True) / others
    deviations = (similarities - mean).masked_fill(is_own, 0)
    return deviations.square().sum(-1) / others


def _of_covariance(features: Tensor, gather: Gather, dtype: torch.dtype) -> Tensor:
    """The variances of this process's rows from the mean and covariance of all items."""
    anchors = features.to(dtype)
    are_constants = gather.anchors_are_local and not gather.gather_with_grad
    items = anchors.detach() if are_constants else anchors
    count = len(items) * gather.place.world_size
    # Two reductions: centred by the mean of all, the products lose no digits to a large common mean.
    mean = gather.total(items.sum(0)) / count
    covariance = gather.total(_Scatter.apply(items, mean)) / count  # type: ignore[no-untyped-call]
    variances: Tensor = _Variances.apply(anchors, items, mean, covariance, count)  # type: ignore[no-untyped-call]
    return variances


class _Scatter(torch.autograd.Function):
    """``Σ_j (x_j − m)(x_j − m)ᵀ``; as the product of two matrices it would cost a third product backward."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, mean: Tensor) -> Tensor:
        ctx.save_for_backward(items, mean)
        centred = items - mean
        return product(centred.T, centred)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        items, mean = ctx.saved_tensors
        by_items = product(items - mean, upstream[0] + upstream[0].T)
        return by_items, -by_items.sum(0)


class _Variances(torch.autograd.Function):
    """``Var_{j≠i}(x_i·x_j)`` of the anchors x_i, which are also items."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, items: Tensor, mean: Tensor, covariance: Tensor, count: int
    ) -> Tensor:
        own, residuals = _own_and_residuals(anchors, items - mean, covariance, count)
        ctx.save_for_backward(anchors, items, mean, covariance, own, residuals)
        ctx.count = count
        return (anchors * residuals).sum(-1) * (count / (count - 1))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        anchors, items, mean, covariance, own, residuals = ctx.saved_tensors
        count = ctx.count
        if torch.is_grad_enabled():  # for second derivatives, which need a graph
            own, residuals = _own_and_residuals(anchors, items - mean, covariance, count)
        weights = upstream[0][:, None] * (count / (count - 1))
        by_anchors = 2 * weights * residuals
        by_items = by_mean = by_covariance = None
        if any(ctx.needs_input_grad[1:]):
            by_items = -2 * weights * own * anchors
            by_mean = -by_items.sum(0)
            by_covariance = product(anchors.T, weights * anchors)
        return by_anchors, by_items, by_mean, by_covariance, None


def _own_and_residuals(
    anchors: Tensor, centred: Tensor, covariance: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """``x_i·(x_i − m) / (N−1)``, ``[n, 1]``, and r of the anchors, ``[n, D]``."""
    own = (anchors * centred).sum(-1, keepdim=True) / (count - 1)
    return own, torch.addcmul(product(anchors, covariance), own, centred, value=-1)
