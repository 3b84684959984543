"""All-gather of embeddings with autograd, by the rules of open_clip's ClipLoss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gather", "all_gather"]


def all_gather(x: Tensor, group: Any = None) -> Tensor:
    r"""Concatenate the tensors of all processes along dim 0, differentiably.

    The gradient comes back summed over the processes:

        y = [x_0; x_1; …; x_{W−1}],   ∂L/∂x_r = Σ_w ∂L_w/∂y[chunk r]

    so that the sum of the processes' losses is differentiated exactly. Where no process group is initialised,
    or it holds one process, ``x`` itself is returned.

    Args:
        x: ``[n, …]``, of one shape on all processes of the group.
        group: a process group; None for the default one.

    Returns:
        ``[W·n, …]``.

    Example:
        >>> all_gather(torch.ones(2, 3)).shape  # one process
        torch.Size([2, 3])
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
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
        # all_reduce and a slice: gloo has no reduce_scatter.
        gradient = grad_outputs[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _gather(x: Tensor, group: Any) -> list[Tensor]:
    x = x.detach().contiguous()
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return gathered


@dataclass(frozen=True)
class Gather:
    """How a loss sees the features of other processes; the fields are open_clip's ClipLoss's.

    ``gather_with_grad`` lets the gradient through to every process. Without it the others' features are
    constants; the own ones still carry a gradient, unless ``local_loss`` leaves that to the anchors.

    Raises:
        ValueError: unless 0 ≤ rank < world_size.
    """

    local_loss: bool = False
    gather_with_grad: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must be in [0, world_size); got rank={self.rank!r}, world_size={self.world_size!r}"
            )

    @property
    def anchors_are_local(self) -> bool:
        """Whether this process computes its own rows only."""
        return self.local_loss and self.world_size > 1

    def __call__(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """The features of all processes, image and text, in the order of the ranks."""
        if self.world_size == 1:
            return image_features, text_features
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"world_size={self.world_size} needs torch.distributed.init_process_group() before the first "
                "forward"
            )
        return self._all(image_features), self._all(text_features)

    def _all(self, features: Tensor) -> Tensor:
        if self.gather_with_grad:
            return all_gather(features)
        chunks = _gather(features, None)
        if not self.local_loss:
            chunks[self.rank] = features
        return torch.cat(chunks)
