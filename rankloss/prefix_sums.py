"""Running sums of exponentials, in log space."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_prefix_sum", "log_suffix_sum"]

# Exponents of one list may span this many nats in float64 before e^−span loses bits to underflow (at 708).
_LINEAR_SPAN = 600.0


def log_prefix_sum(x: Tensor) -> Tensor:
    r"""``log Σ_{k ≤ p} e^{x_k}`` at every position p of the last dimension; not differentiable.

    Equal to ``torch.logcumsumexp``, which on a CPU takes one exponential and one logarithm after the other.
    There a plain running sum in float64 does the same several times faster, and as exactly, as long as the
    exponents of no list span more than 600 nats; unit-norm features at CLIP's largest scale span 200.

    Example:
        >>> log_prefix_sum(torch.zeros(3)).exp()
        tensor([1., 2., 3.])
    """
    if x.device.type != "cpu":  # a parallel scan there, and looking at the span would wait for the device
        return torch.logcumsumexp(x, -1)
    largest = x.amax(-1, keepdim=True)
    if not bool((largest - x.amin(-1, keepdim=True)).amax() <= _LINEAR_SPAN):  # also where there is a NaN
        return torch.logcumsumexp(x, -1)
    sums = (x - largest).double().exp_().cumsum_(-1).log_()
    return sums.add_(largest).to(x.dtype)


def log_suffix_sum(x: Tensor) -> Tensor:
    """``log Σ_{k ≥ p} e^{x_k}``, see :func:`log_prefix_sum`.

    Example:
        >>> log_suffix_sum(torch.zeros(3)).exp()
        tensor([3., 2., 1.])
    """
    return log_prefix_sum(x.flip(-1)).flip(-1)
