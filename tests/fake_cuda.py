"""CUDA tensors without a card: it is known where they are, not what they hold, and a look at one raises."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Copies(TorchDispatchMode):
    """Collects the operations that have tensors on more than one device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(str(func))
        return result


@contextlib.contextmanager
def fake_cuda() -> Iterator[Copies]:
    """Inside, ``device="cuda"`` makes a fake tensor; yields the copies between devices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an autocast region on a device that is not there
        with FakeTensorMode(), Copies() as copies, _Indexing():
            yield copies


class _Indexing(TorchFunctionMode):
    """Python's indexing by torch's operators: its own way asks for a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return _item(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            return torch.ops.aten.copy_.default(_item(x, index), value)
        return _BY_OPERATOR.get(func, func)(*args, **(kwargs or {}))


_BY_OPERATOR = {
    Tensor.contiguous: torch.ops.aten.contiguous.default,
    Tensor.copy_: torch.ops.aten.copy_.default,
}


def _item(x: Tensor, index: Any) -> Tensor:
    aten = torch.ops.aten
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x.dim() - consumed)
    tensors: list[Tensor | None] = []
    for part in parts:
        dim = len(tensors)
        if isinstance(part, Tensor):
            tensors.append(part)
            continue
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif part != slice(None):
            x = aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        tensors.append(None)
    return x if all(p is None for p in tensors) else aten.index.Tensor(x, tensors)
