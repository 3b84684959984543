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
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            own_args, own_kwargs = tree_map_only(Tensor, self._stand_in, (args, kwargs))
            self.calls.append(functools.partial(func, *own_args, **own_kwargs))
        return func(*args, **kwargs)

    def _stand_in(self, x: Tensor) -> Tensor:
        """A tensor of random numbers with the layout of an operand, the same one for equal layouts."""
        layout = (x.shape, x.stride(), x.dtype)
        if layout not in self._stand_ins:
            stand_in = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            self._stand_ins[layout] = stand_in.normal_()
        return self._stand_ins[layout]


def products_of(step: Step) -> Step:
    """A step of the matrix products of a step, and nothing else."""
    with _Products() as products:
        step()

    @torch.no_grad()
    def repeat() -> None:
        for call in products.calls:
            call()

    return repeat
