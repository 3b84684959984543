"""One of several processes, without the others: what it computes, and nothing of its messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

import rankloss


@contextlib.contextmanager
def one_of(processes: int, own: Sequence[Tensor], everyone: Sequence[Tensor]) -> Iterator[None]:
    """Inside, this process is rank 0 of so many, in torch's fake process group.

    Where a loss gathers one of the features ``own``, it gets that of ``everyone`` at the same place.
    """
    if processes == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def all_gather(x: Tensor, group: Any = None) -> Tensor:
        return next(whole for part, whole in zip(own, everyone, strict=True) if part is x)

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with mock.patch.object(rankloss.distributed, "all_gather", all_gather):
            yield
    finally:
        dist.destroy_process_group()
