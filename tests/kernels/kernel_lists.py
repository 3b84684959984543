"""Blocks of lists for the kernels' tests, and what float64 and autograd make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from devices import DEVICE
from rankloss import plackett_luce_nll
from rankloss.equal_rows import first_occurrence
from rankloss.kernels import evaluate_rows
from rankloss.ranking import quantize

__all__ = ["Lists", "random_lists", "sums_of_weights"]


@dataclass(frozen=True)
class Lists:
    """The arguments of a call, on the CPU."""

    cosines: Tensor
    reference: Tensor
    scale: float
    first_row: int = 0
    first_equal: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None

    def replace(self, **changes: Any) -> Lists:
        return replace(self, **changes)

    @property
    def rounding(self) -> float:
        """Four roundings (2⁻²⁴ each) of a score that differs from its row's largest by the whole span."""
        span = self.cosines.amax(-1) - self.cosines.amin(-1)
        return float(span.max()) * self.scale * 2.0**-22

    def run(self, **options: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """What the kernel gives, on the CPU."""

        def there(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(DEVICE)

        beta = torch.ones(()) if self.beta is None else self.beta
        found = evaluate_rows(
            there(self.cosines),
            there(self.reference),
            torch.tensor(self.scale, device=DEVICE),
            there(beta),
            alpha=there(self.alpha),
            first_row=self.first_row,
            first_equal=there(self.first_equal),
            **options,
        )
        cross_entropy, nll, gradient = (None if x is None else x.cpu() for x in found)
        assert nll is not None
        return cross_entropy, nll, gradient

    def expected(
        self,
        *,
        method: str = "sort",
        bins: int = 2048,
        diagonal: bool = True,
        mean: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CE, NLL and gradient in float64, by autograd, from the same float32 cosines."""
        n, N = self.cosines.shape
        own = torch.arange(self.first_row, self.first_row + n)
        x = (self.cosines.double() * self.scale).requires_grad_()
        y = self.reference if self.first_equal is None else self.reference[:, self.first_equal.long()]
        cross_entropy = F.cross_entropy(x, own, reduction="none")
        listed, length = torch.ones(n, N, dtype=torch.bool), N
        if not diagonal:
            listed, length = listed.scatter_(1, own[:, None], False), N - 1
        x_listed, y_listed = (z[listed].view(n, length) for z in (x, y))
        if method == "bin":
            y_listed = quantize(y_listed, bins)
        nll = plackett_luce_nll(x_listed, y_listed, **options)
        if mean:
            nll = nll / sums_of_weights(y_listed, **options)
        alpha = torch.zeros(()) if self.alpha is None else self.alpha
        beta = torch.ones(()) if self.beta is None else self.beta
        total = (alpha.double() * cross_entropy + beta.double() * nll).sum()
        (gradient,) = torch.autograd.grad(total, x)
        return cross_entropy.detach(), nll.detach(), gradient


def sums_of_weights(reference: Tensor, top_k: int | None = None, discount: str | None = None) -> Tensor:
    """Σ_p μ_p of every list, by the definition: ``[n]`` in float64."""
    rank = 1 + (reference[:, None, :] > reference[:, :, None]).sum(-1)  # tied items share the best
    mu = torch.ones_like(rank, dtype=torch.float64)
    if discount == "log":
        mu = 1 / (1 + rank.double()).log()
    return torch.where(rank <= (top_k or reference.shape[1]), mu, 0).sum(-1)


def random_lists(
    n: int, N: int, scale: float, *, dim: int = 32, seed: int = 0, duplicates: int = 0, weights: bool = True
) -> Lists:
    """Rows of a cross-modal matrix whose last items repeat earlier ones, and one of which is zero."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(N, dim, generator=generator), dim=-1) for _ in range(2))
    if duplicates:
        image[-duplicates:] = image[:duplicates]
        text[-duplicates:] = text[:duplicates]
        image[duplicates] = 0
    first_row = (N - n) // 2
    rows = slice(first_row, first_row + n)
    return Lists(
        image[rows] @ text.T,
        text[rows] @ image.T,
        scale,
        first_row,
        first_occurrence(image) if duplicates else None,
        torch.rand(n, dtype=torch.float64, generator=generator) if weights else None,
        torch.tensor(0.7, dtype=torch.float64) if weights else None,
    )
