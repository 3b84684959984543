"""The kernels run on ``RANKLOSS_TEST_DEVICE``; on a CPU that is Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import pytest

from devices import DEVICE

if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_evaluate_rows.py", "test_compilation.py", "test_kernel_traffic.py"]
elif DEVICE.type == "cpu":
    # Triton decides when a function is decorated whether it is interpreted, its own library included.
    assert "triton" not in sys.modules, "Triton was imported before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("sorted_rows", "binned_rows"):
        importlib.import_module(f"rankloss.kernels.device.{name}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
