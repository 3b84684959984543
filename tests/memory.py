"""Memory counted, for the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], object]) -> int:
    """The bytes that a forward pass keeps for the backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = forward()
    del kept  # alive until here, so that no storage's address is taken twice
    return sum(storages.values())


class TensorSizes(TorchDispatchMode):
    """Counts the elements of what operations return: those of the largest storage, and of all results."""

    largest = total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
                self.total += x.numel()
        return result


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is entered, as long as they live.

    ``peak`` is the most at any time.

    Example::

        with LiveBytes() as live:
            criterion(image_features, text_features, logit_scale).backward()
        assert live.peak < 2**20
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in _tensors(result):
            storage = StorageWeakRef(x.untyped_storage())
            if storage not in before:
                self._alive[storage] = x.untyped_storage().nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result

    @property
    def now(self) -> int:
        """The bytes of those that live."""
        return sum(size for ref, size in self._alive.items() if not ref.expired())


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
