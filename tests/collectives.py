"""Collective calls counted, for the tests: what a step costs in messages between processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Counts this process's collective calls while it is entered: ``{"allgather": 2, "allreduce": 1, …}``.

    ``filled`` has the bytes of the tensors that they fill: of all processes' chunks in ``"allgather"``, of
    the sum in ``"allreduce"``.

    Every call passes torch's dispatcher as an operator of the namespace ``c10d``, whoever makes it: Python,
    an autograd function in the backward pass, or DDP's reducer in C++. The names are the operators', without
    their outer underscores: ``all_gather`` is ``"allgather"``, ``all_gather_into_tensor``
    ``"allgather_base"``.

    Example::

        with Collectives() as calls:
            loss = criterion(image_features, text_features, logit_scale)
        assert calls.counts == {"allgather": 2}
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.filled: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.counts[name] += 1
            self.filled[name] += sum(x.nbytes for x in tree_leaves(args[:1]) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))
