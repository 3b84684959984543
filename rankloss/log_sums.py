"""Running sums of exponentials in log space, differentiable any number of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_cumsum_exp(x: Tensor) -> Tensor:
    """``y_p = log Σ_{q ≤ p} e^{x_q}`` along the last dimension, for lists of any span.

    :func:`torch.logcumsumexp` has the same values, but its second derivative is NaN where a gradient from
    above is 0.

    Example:
        >>> log_cumsum_exp(torch.tensor([0.0, 2000.0, 0.0])).tolist()
        [0.0, 2000.0, 2000.0]
    """
    y: Tensor = _LogCumSumExp.apply(x)  # type: ignore[no-untyped-call]
    return y


class _LogCumSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.logcumsumexp(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        # ∂/∂x_q = e^{x_q}·Σ_{p ≥ q} e^{−y_p}·g_p
        gradient: Tensor = _RunningSum.apply(-y, x, upstream[0], True)  # type: ignore[no-untyped-call]
        return gradient


class _RunningSum(torch.autograd.Function):
    """``z_p = e^{b_p}·Σ_q e^{a_q}·g_q`` over q ≤ p, or over q ≥ p if ``is_reversed``.

    The sums of positive and of negative g are in log space. The transpose has a and b exchanged and runs the
    other way.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor, is_reversed: bool) -> Tensor:
        flipped = [-1] if is_reversed else []  # dimensions

        def sum_of_positive(weights: Tensor) -> Tensor:
            log_terms = a + weights.clamp_min(0.0).log()  # −∞ for a weight that is not positive
            log_sums = log_terms.flip(flipped).logcumsumexp(-1).flip(flipped)
            return (b + log_sums).exp()

        z = sum_of_positive(g) - sum_of_positive(-g)
        ctx.is_reversed = is_reversed
        ctx.save_for_backward(a, b, g, z)
        return z

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, b, g, z = ctx.saved_tensors
        transposed: Tensor = _RunningSum.apply(b, a, upstream[0], not ctx.is_reversed)  # type: ignore[no-untyped-call]
        return g * transposed, upstream[0] * z, transposed, None
