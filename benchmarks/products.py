"""The matrix products of a step alone: what the rest of it costs is the difference."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from turns import Step


class _Products(TorchDispatchMode):
    """Records the products of matrices, with stand-ins of the same layout for their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Step] = []
        self._stand_ins: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            given, named = tree_map_only(Tensor, self._stand_in, (args, kwargs or {}))
            self.calls.append(functools.partial(func, *given, **named))
        return func(*args, **(kwargs or {}))

    def _stand_in(self, x: Tensor) -> Tensor:
        layout = (x.shape, x.stride(), x.dtype)
        if layout not in self._stand_ins:
            self._stand_ins[layout] = torch.empty_strided(
                *layout[:2], dtype=x.dtype, device=x.device
            ).normal_()
        return self._stand_ins[layout]


def products_of(step: Step) -> Step:
    """A step of the matrix products of a step, and nothing else."""
    with _Products() as products:
        step()
    return torch.no_grad()(lambda: [call() for call in products.calls])
