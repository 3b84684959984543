"""All-gather of embeddings with autograd, by the rules of open_clip's ClipLoss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gather", "Gathered", "all_gather"]

Gathered: TypeAlias = tuple[Tensor, Tensor]
"""The image and the text features of all processes, as :class:`Gather` gives them."""


def all_gather(x: Tensor, group: Any = None) -> Tensor:
    r"""Concatenate the tensors of all processes along dim 0, differentiably.

    The gradient comes back summed over the processes:

        y = [x_0; x_1; …; x_{W−1}],   ∂L/∂x_r = Σ_w ∂L_w/∂y[chunk r]

    so that the sum of the processes' losses is differentiated exactly, and can be differentiated again. Where
    no process group is initialised, or it holds one process, ``x`` itself is returned.

    Args:
        x: ``[n, …]``, of one shape and dtype on all processes of the group.
        group: a process group; None for the default one.

    Returns:
        ``[W·n, …]``.

    Raises:
        ValueError: if this process does not belong to ``group``.

    Example:
        >>> all_gather(torch.ones(2, 3)).shape  # one process
        torch.Size([2, 3])
    """
    if not _initialized() or _world_size(group) == 1:
        return x
    result: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return torch.cat(_gather(x, group))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad_outputs[0], ctx.group), None  # type: ignore[no-untyped-call]


class _ReduceScatter(torch.autograd.Function):
    """Sum over the processes, and of the sum this process's chunk: what :class:`_AllGather` is adjoint to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        # In float32 at least: a sum in half precision would be the worse the more processes add to it.
        dtype = torch.promote_types(y.dtype, torch.float32)
        total = y.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        # all_reduce and a slice: not every gloo has reduce_scatter.
        dist.all_reduce(total, group=group)
        return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].to(y.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grad_outputs[0], ctx.group), None  # type: ignore[no-untyped-call]


def _gather(x: Tensor, group: Any) -> list[Tensor]:
    x = x.detach().contiguous()
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return gathered


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _world_size(group: Any) -> int:
    # To a process that is left out, torch.distributed.new_group gives something that is no group.
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group that this process belongs to; got {group!r}")
    return dist.get_world_size(group)


@dataclass(frozen=True)
class Gather:
    """How a loss sees the features of other processes; the fields are open_clip's ClipLoss's, and the group.

    ``gather_with_grad`` lets the gradient through to every process. Without it the others' features are
    constants; the own ones still carry a gradient, unless ``local_loss`` leaves that to the anchors.

    ``rank`` and ``world_size`` count within ``group`` (None: the default one). ``world_size=1`` gathers
    nothing, whatever the default group holds.

    Raises:
        ValueError: unless 0 ≤ rank < world_size, and where they are not this process's rank in the group and
            the group's size; for the default group at the first call, since it may be initialised later than
            the loss is built.
    """

    local_loss: bool = False
    gather_with_grad: bool = False
    rank: int = 0
    world_size: int = 1
    group: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must be in [0, world_size); got rank={self.rank!r}, world_size={self.world_size!r}"
            )
        if self.group is not None:
            self._check_group()

    @property
    def min_pairs(self) -> int:
        """The pairs that this process must bring, so that the whole batch has two."""
        return 1 if self.world_size > 1 else 2

    @property
    def anchors_are_local(self) -> bool:
        """Whether this process computes its own rows only."""
        return self.local_loss and self.world_size > 1

    def first_row(self, own: int) -> int:
        """Where this process's ``own`` rows begin among the columns; 0 where all rows are computed."""
        return self.rank * own if self.anchors_are_local else 0

    def __call__(self, image_features: Tensor, text_features: Tensor) -> Gathered:
        """The features of all processes, image and text, in the order of the ranks."""
        if self.world_size == 1:
            return image_features, text_features
        if not _initialized():
            raise RuntimeError(
                f"world_size={self.world_size} needs torch.distributed.init_process_group() before the first "
                "forward"
            )
        self._check_group()
        return self._all(image_features), self._all(text_features)

    def _check_group(self) -> None:
        # With another process's rank or count the loss would be a number, and a wrong one.
        size, rank = _world_size(self.group), dist.get_rank(self.group)
        if (self.rank, self.world_size) != (rank, size):
            raise ValueError(
                f"this process has rank {rank} of {size} in its process group; "
                f"got rank={self.rank!r}, world_size={self.world_size!r}"
            )

    def _all(self, features: Tensor) -> Tensor:
        if self.gather_with_grad:
            return all_gather(features, self.group)
        chunks = _gather(features, self.group)
        if not self.local_loss:
            chunks[self.rank] = features
        return torch.cat(chunks)
