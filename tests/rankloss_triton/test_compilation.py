"""Registers and spills of the kernels, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
REGISTERS = 65_536  # of a multiprocessor


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this build of Triton has no NVIDIA assembler")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_nothing_spills_on_hopper_and_a_launchs_programs_fit_together(compiled: list[dict[str, Any]]) -> None:
    """As the runtime compiles."""
    assert len(compiled) == 8
    for kernel in compiled:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        # Registers are given out to warps in units of 256.
        warp = -(-32 * kernel["registers"] // 256) * 256
        used = kernel["programs_per_processor"] * (kernel["threads"] // 32) * warp
        assert used <= REGISTERS, kernel
