"""The fused kernels on CPU tensors: Triton's interpreter, for the tests of the kernels and of the core."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings

from devices import DEVICE

HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

if HAS_TRITON and DEVICE.type == "cpu":
    # Triton decides when a function is decorated whether it is interpreted, its own library included.
    assert "triton" not in sys.modules, "Triton was imported before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("sorted_rows", "binned_rows"):
        importlib.import_module(f"rankloss.kernels.device.{name}")
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
