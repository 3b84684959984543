"""The fused kernels on CPU tensors: Triton's interpreter, for the tests of the kernels and of the core."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import Phase, settings
from torch.torch_version import TorchVersion

from devices import DEVICE
from rankloss_triton.launching import EARLIEST_TRITON, triton_version

_TRITON = TorchVersion(triton_version() or "0")
# Triton before 3.7 does what NumPy warns of since 1.25, and refuses since 2.4.
HAS_TRITON = _TRITON >= EARLIEST_TRITON if TorchVersion(np.__version__) < "1.25" else _TRITON >= "3.7"

if HAS_TRITON and DEVICE.type == "cpu":
    # Triton decides when a function is decorated whether it is interpreted, its own library included.
    assert "triton" not in sys.modules, "Triton was imported before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("sorted_rows", "binned_rows"):
        importlib.import_module(f"rankloss_triton.device.{name}")
    del os.environ["TRITON_INTERPRET"]


def few_examples(count: int) -> settings:
    """For a property of the kernels: so many examples, and none made smaller, which would take minutes."""
    return settings(max_examples=count, phases=(Phase.explicit, Phase.generate))


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, the kernels take CPU tensors, as a user asks for it; on another device they need nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield
