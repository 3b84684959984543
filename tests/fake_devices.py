"""Devices that are not there: the CPU as one without float64, and meta tensors as those of an accelerator."""

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

CUDA, MPS, _META = torch.device("cuda", 0), torch.device("mps", 0), torch.device("meta")


class _Watch(TorchDispatchMode):
    """Collects the operations between the meta device and others, and refuses float64 where there is none."""

    def __init__(self, has_float64: bool) -> None:
        super().__init__()
        self.has_float64, self.copies = has_float64, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not self.has_float64 and any(x.dtype == torch.float64 for x in results):
            raise TypeError(f"{func} gives float64, which the device has not")
        is_between_devices = len({x.is_meta for x in results + inputs}) > 1
        if is_between_devices:
            self.copies.append(str(func))
        return result


@contextlib.contextmanager
def no_float64() -> Iterator[None]:
    """Inside, no device has float64: a tensor of it is an error."""
    with mock.patch.object(precision, "has_float64", return_value=False), _Watch(has_float64=False):
        yield


class _MetaAs(TorchFunctionMode):
    """Lets meta tensors say that they are on a device, and makes tensors for that device on meta."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            device = func(*args)
            return self.device if device.type == "meta" else device

        def to_meta(argument: Any) -> Any:
            return _META if argument == self.device else argument

        args, kwargs = tree_map(to_meta, (tuple(args), dict(kwargs or {})))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _META:
            # A device with values gets them by a copy from the CPU, which is to be counted.
            return func(*args, **{**kwargs, "device": "cpu"}).to(_META)
        return func(*args, **kwargs)


@contextlib.contextmanager
def meta_is(device: torch.device) -> Iterator[list[str]]:
    """Inside, meta tensors say that they are on this device; yields the operations that copy to it.

    A look at a value, a copy from it and, if the device has no float64, a tensor of it are errors.
    """
    with _MetaAs(device), _Watch(precision.has_float64(device)) as watch:
        yield watch.copies
