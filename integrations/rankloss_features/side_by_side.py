"""Parts of a head: a projection in closed form, an encoder's own features, and several parts side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankloss.precision import unit_rows


class Projection(nn.Module):
    """(x − mean)·P of unit-norm features, ``[n, D]``; one side of a canonical correlation analysis.

    Args:
        features: D.
        width: The dimensions of the common space.
        root: Take sign(x)·√|x| of the features first, again of unit norm.

    Attributes:
        mean: ``[D]``.
        matrix: P, ``[D, width]``.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, features: int, width: int, *, root: bool) -> None:
        super().__init__()
        self.width, self.root = width, root
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("matrix", torch.zeros(features, width))

    def forward(self, features: Tensor) -> Tensor:
        """The projected features."""
        if self.root:
            features = unit_rows(features.sign() * features.abs().sqrt())
        return (features - self.mean) @ self.matrix


class Own(nn.Identity):
    """The encoder's own features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class SideBySide(nn.Module):
    """Several parts as one: its cosines are the mean of theirs, by shares that add up to 1.

    Each part's features are of unit norm, times the root of its share.

    Args:
        parts: The parts.
        shares: The share of each.

    Example:
        >>> both = SideBySide([Own(2), Own(2)], [0.5, 0.5])
        >>> both(torch.tensor([[0.6, 0.8]])).norm()
        tensor(1.)
    """

    def __init__(self, parts: Sequence[nn.Module], shares: Sequence[float]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.scales = [math.sqrt(share) for share in shares]
        widths: list[Any] = [part.width for part in parts]
        self.width: int = sum(widths)

    def forward(self, features: Tensor) -> Tensor:
        """The parts' features side by side, ``[n, width]``."""
        scaled = []
        for scale, part in zip(self.scales, self.parts, strict=True):
            scaled.append(scale * unit_rows(part(features)))
        return torch.cat(scaled, dim=-1)
