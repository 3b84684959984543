"""The device of the features that the core's tests draw: ``RANKLOSS_TEST_DEVICE``, the CPU by default.

What a test compares with (NumPy, float64 oracles) stays on the CPU; so do features that a test writes out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankloss import precision

__all__ = ["DEVICE", "without_float64"]

DEVICE = torch.device(os.environ.get("RANKLOSS_TEST_DEVICE", "cpu"))


@contextmanager
def without_float64() -> Iterator[None]:
    """A device that refuses float64, as MPS does: an operation that makes such a tensor raises an error."""
    with pytest.MonkeyPatch.context() as patch, _RefusesFloat64():
        patch.setattr(precision, "has_float64", lambda device: False)
        yield


class _RefusesFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.dtype == torch.float64 for x in made):
            raise TypeError(f"this device has no float64, which {func} makes")
        return result
