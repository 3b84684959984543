"""Execution of a loss: arithmetic, access to values, and compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec("P")
T = TypeVar("T")


def arithmetic_dtype(*features: Tensor) -> torch.dtype:
    """Float32, or float64 if any of the features is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def has_float64(device: torch.device) -> bool:
    """True if the device computes in float64; MPS and some of Intel's accelerators do not.

    Example:
        >>> has_float64(torch.device("cpu")), has_float64(torch.device("mps"))
        (True, False)
    """
    if device.type == "xpu":
        return bool(torch.xpu.get_device_capability(device)["has_fp64"])
    return device.type != "mps"


def widest_dtype(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device without it.

    Example:
        >>> widest_dtype(torch.device("cpu")), widest_dtype(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float64 if has_float64(device) else torch.float32


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over lists of scores in ``x``: float64 on a CPU, that of ``x`` elsewhere.

    Sums of logarithms in float32 move fewer bytes than sums in float64, which some devices do not have.
    """
    return torch.float64 if x.is_cpu and has_float64(x.device) else x.dtype


def in_arithmetic(x: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor or number in a dtype, on a device."""
    if isinstance(x, Tensor):
        is_number = x.numel() == 1  # for which, as a scale on a CPU, the host need not wait
        return x.resolve_neg().to(device, non_blocking=is_number).to(dtype)
    # Filled on the device: copying a number to it would make the host wait.
    return torch.full((), x, dtype=dtype, device=device)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, which would compute products in half precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta has no autocast
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def constant(x: Tensor) -> Tensor:
    """The tensor without its graph; an inference tensor is copied, since autograd cannot save it."""
    return x.detach().clone() if x.is_inference() else x.detach()


def nan_unless_finite(values: Tensor, *features: Tensor) -> Tensor:
    """The values if all features are finite and no product can overflow; else NaN, which the loss shows."""
    dtype = arithmetic_dtype(*features)  # in float16 the cube would overflow from some 400 unit-norm rows on
    norms = (torch.linalg.vector_norm(x.detach(), dtype=dtype) for x in features)  # of whole matrices
    sum_of_norms = functools.reduce(torch.add, norms)
    # A product of two rows is at most the product of the norms, and the cube overflows before it does.
    overflows_first = sum_of_norms**3
    # values + 0 · values · overflows_first, in one operation; 0 · ∞ is NaN.
    return torch.addcmul(values, values, overflows_first, value=0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, forward and backward in the dtype of the factors, also under autocast.

    It is differentiable any number of times.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product(torch.eye(2), torch.eye(2)).dtype
        torch.float32
    """
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


_EXTREME = 1e-10, 1e15
"""The largest values of a row between which its sum of squares is in the range of float32, and not tiny."""


def unit_rows(x: Tensor) -> Tensor:
    """The rows divided by their norms, also where float32 cannot hold the squares of their values.

    Example:
        >>> unit_rows(torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    least, most = _EXTREME
    largest = x.abs().amax(dim=-1, keepdim=True)
    is_extreme = (largest > most) | ((largest < least) & (largest > 0))
    return F.normalize(torch.where(is_extreme, x / largest, x), dim=-1)


def can_be_read(x: Tensor) -> bool:
    """True if a value may be read, even with a wait; False while a graph is captured, and without values.

    Meta tensors and torch's fake tensors have none.
    """
    if x.is_meta or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Exclude a function from compiled graphs: one graph ends before it, the next begins after it.

    For a ``forward`` that reads values or gathers: with ``fullgraph=True`` torch raises its own error.

    Example:
        >>> @outside_graphs
        ... def largest(x):
        ...     return x.max().item()
        >>> largest(torch.eye(2))
        1.0
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return called
