"""Losses of the study that the library does not have, written with whole matrices of similarities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankloss

_ROOT = 1e-9  # of s²: the root has a gradient at equal rows
Form = Callable[[Tensor, Tensor], Tensor]
"""A value of similarities to the others, ``[N, N − 1]``, and the scale's square."""


def standard_deviation(others: Tensor, squared_scale: Tensor) -> Tensor:
    """``mean_i std_{j≠i} x_ij``."""
    return (others.var(1, correction=0) + _ROOT * squared_scale).sqrt().mean()


def variance(others: Tensor, _: Tensor) -> Tensor:
    """``mean_i ½·var_{j≠i} x_ij``."""
    return others.var(1, correction=0).mean() / 2


def log_mean_exp(others: Tensor, _: Tensor) -> Tensor:
    """``mean_i log mean_{j≠i} exp(x_ij)``."""
    return (others.logsumexp(1) - torch.tensor(others.shape[1]).log()).mean()


def uniform(others: Tensor, _: Tensor) -> Tensor:
    """Cross-entropy of the softmax over the others and a uniform target."""
    return (others.logsumexp(1) - others.mean(1)).mean()


def one_hot(others: Tensor, _: Tensor) -> Tensor:
    """Cross-entropy of the softmax over the others and one of them, drawn for each item."""
    drawn = torch.randint(others.shape[1], (len(others), 1))
    return (others.logsumexp(1) - others.gather(1, drawn).squeeze(1)).mean()


FORMS: dict[str, Form] = {
    "std": standard_deviation,
    "variance": variance,
    "log-mean-exp": log_mean_exp,
    "uniform": uniform,
    "one-hot": one_hot,
}


class WithinModalities(nn.Module):
    """``L_base + weight·½(f(s·V·Vᵀ) + f(s·T·Tᵀ))``, f a form of an item's similarities to the others.

    Args:
        form: Of :data:`FORMS`.
        weight: Of the term.
        base: Of features and scale, and of all further arguments.
        is_scale_constant: The scale is not learned through the term.
    """

    def __init__(
        self, form: str, weight: float, base: nn.Module | None = None, *, is_scale_constant: bool = False
    ) -> None:
        super().__init__()
        self.form, self.weight, self.is_scale_constant = FORMS[form], weight, is_scale_constant
        self.base = base or rankloss.ClipLoss()

    def forward(self, v: Tensor, t: Tensor, scale: Tensor, **inputs: Tensor) -> Tensor:
        """Return the loss."""
        of_term = scale.detach() if self.is_scale_constant else scale
        values = [self.form(others(of_term * x @ x.T), of_term.square()) for x in (v, t)]
        return self.base(v, t, scale, **inputs) + self.weight * (values[0] + values[1]) / 2


class SameTowerLoss(nn.Module):
    """One softmax over a pair's other modality and, weighted, the other items of its own.

    ``−x_ii + log(Σ_j exp(x_ij) + weight·Σ_{j≠i} exp(y_ij))``, x the similarities of the modalities, y those
    within the row's; the mean over rows and both ways. Without the second sum it is CLIP's loss.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, v: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        """Return the loss."""
        log_weight = torch.tensor(self.weight).log()
        values = []
        for x, z in ((v, t), (t, v)):
            across = scale * x @ z.T
            within = others(scale * x @ x.T).logsumexp(1) + log_weight
            values.append((torch.logaddexp(across.logsumexp(1), within) - across.diagonal()).mean())
        return (values[0] + values[1]) / 2


def others(square: Tensor) -> Tensor:
    """Return a square matrix without its diagonal, ``[N, N − 1]``.

    Example:
        >>> others(torch.arange(9).view(3, 3)).tolist()
        [[1, 2], [3, 5], [6, 7]]
    """
    n = len(square)
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
