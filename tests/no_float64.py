"""Devices without float64: the CPU as one, and MPS without its hardware. A tensor of float64 is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rankloss import precision

MPS, _META = torch.device("mps", 0), torch.device("meta")


class _Refusal(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func} gives float64, which the device has not")
        return result


@contextlib.contextmanager
def no_float64() -> Iterator[None]:
    """Inside, no device has float64."""
    with mock.patch.object(precision, "has_float64", return_value=False), _Refusal():
        yield


class _AsMps(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            device = func(*args)
            return MPS if device.type == "meta" else device
        args, kwargs = tree_map(lambda x: _META if x == MPS else x, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


@contextlib.contextmanager
def meta_is_mps() -> Iterator[None]:
    """Inside, tensors on the meta device say that they are on MPS. A copy to the CPU is torch's error."""
    with _AsMps(), _Refusal():
        yield
