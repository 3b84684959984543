"""The kernels run on ``RANKLOSS_TEST_DEVICE``; on a CPU that is Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest

from devices import DEVICE

if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_evaluate_rows.py", "test_compilation.py", "test_kernel_traffic.py"]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
