"""Execution of a loss: its arithmetic, its access to values, and its place in a compiled graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec("P")
T = TypeVar("T")


def arithmetic_dtype(*features: Tensor) -> torch.dtype:
    """Float32, or float64 if any of the features is that."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def in_arithmetic(x: Tensor | float, dtype: torch.dtype, home: torch.device) -> Tensor:
    """A tensor or number in a dtype, on ``home``, or on the CPU if that is MPS, which has no float64."""
    device = torch.device("cpu") if home.type == "mps" else home
    if isinstance(x, Tensor):
        return x.resolve_neg().to(device, non_blocking=x.numel() == 1).to(dtype)
    # Filled in on the device: to copy a number to it would make the host wait.
    return torch.full((), x, dtype=dtype, device=device)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, which would turn products into half precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta knows no autocast
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def constant(x: Tensor) -> Tensor:
    """Without a graph; a copy of an inference tensor, which autograd cannot save."""
    return x.detach().clone() if x.is_inference() else x.detach()


def nan_unless_finite(weights: Tensor, *features: Tensor) -> Tensor:
    """The weights if all features are finite and no product can overflow, else NaN, as the loss is then."""
    norms = (torch.linalg.vector_norm(x.detach()) for x in features)
    # A product of two rows is at most that of the norms, and overflows after the cube. 0 · ∞ is NaN.
    return torch.addcmul(weights, weights, functools.reduce(torch.add, norms) ** 3, value=0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, forward and backward in the dtype of the factors whatever autocast asks for."""
    c: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return c


class _Product(torch.autograd.Function):
    """A product whose backward pass may run in an autocast region, differentiable any number of times."""

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


def can_be_read(x: Tensor) -> bool:
    """True where a value may be read, even if that waits: not while a graph is captured."""
    if x.is_meta or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Let a compiled graph end before the function and go on after it, so that it runs as written."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return called
