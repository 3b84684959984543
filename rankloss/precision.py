"""In which precision losses compute, and what they may ask of a value while they do."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def arithmetic_dtype(*features: Tensor) -> torch.dtype:
    """Float32, or float64 if any of the features is that."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def dtype_of_numbers(device: torch.device) -> torch.dtype:
    """What numbers beside features are kept in: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Outside any autocast region, which would turn products into half precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta knows no autocast
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def may_look_at(x: Tensor) -> bool:
    """Whether Python may branch on a value.

    On an accelerator this would synchronise every step; under torch.compile it would break the graph; a fake
    tensor has no value.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def nan_unless_finite(weights: Tensor, *features: Tensor | None) -> Tensor:
    """The weights if all features are finite and no product can overflow, else NaN, as the loss is then."""
    norms = (torch.linalg.vector_norm(x.detach()) for x in features if x is not None)
    # A product of two rows is at most that of the norms, and overflows after the cube. 0 · ∞ is NaN.
    return torch.addcmul(weights, weights, functools.reduce(torch.add, norms) ** 3, value=0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, forward and backward in the dtype of the factors whatever autocast asks for."""
    c: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return c


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device):
            return a @ b

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        by_a, by_b = ctx.needs_input_grad
        return (
            product(upstream[0], b.mT) if by_a else None,
            product(a.mT, upstream[0]) if by_b else None,
        )
