"""A memory of the data set: the denominators of CLIP's loss, estimated over all steps (SogCLR, FastCLIP)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LEAST = 0.2  # γ of the second half


class MemoryLoss(nn.Module):
    """SogCLR's loss (arXiv 2202.12387), with the schedule of γ of FastCLIP (arXiv 2407.01445).

    ``g_i = mean_{j≠i} exp(s·(S_ij − S_ii))``, ``u_i ← (1 − γ)·u_i + γ·g_i``, at a pair's first visit
    ``u_i ← g_i``; the gradient is the mean over i of ``∇g_i / (ε + u_i)``, the mean of both ways. With γ = 1
    and ε = 1/(N − 1), N the batch, this is the gradient of CLIP's loss.

    Args:
        pairs: Of the data set.
        epsilon: ε; None: 1/(pairs − 1).
    """

    def __init__(self, pairs: int, epsilon: float | None = None) -> None:
        super().__init__()
        self.epsilon, self.gamma = epsilon or 1 / (pairs - 1), 1.0
        self.register_buffer("means", torch.full((2, pairs), math.nan, dtype=torch.float64))

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Set γ for an epoch, from 1: 1 to 0.2 along a cosine over half of the epochs."""
        share = min(1.0, (epoch - 1) / (epochs / 2))
        self.gamma = _LEAST + (1 - _LEAST) * (1 + math.cos(math.pi * share)) / 2

    def forward(self, v: Tensor, t: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
        """Return a number with the loss's gradient; ``rows`` are the pairs' places in the data set."""
        cosines = v.double() @ t.double().T  # e^200 is no float32
        others = ~torch.eye(len(cosines), dtype=torch.bool)
        total = cosines.new_zeros(())
        for means, of in zip(self.means, (cosines, cosines.T), strict=True):
            ratios = (scale * (of - of.diagonal().unsqueeze(1))).exp()
            g = ratios[others].view(len(of), -1).mean(1)
            old, new = means[rows], g.detach()
            means[rows] = torch.where(old.isnan(), new, (1 - self.gamma) * old + self.gamma * new)
            total = total + (g / (self.epsilon + means[rows])).mean()
        return total / 2
