"""Registers and spills of the kernels, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import rankloss
from rankloss_triton import launching

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


def test_two_registers_spill_at_most_and_a_launchs_programs_fit_together(
    compiled: list[dict[str, Any]],
) -> None:
    """On Hopper, as the runtime compiles: the ranks of lists of 1,024 items need 130 of 128 registers."""
    assert len(compiled) == 8
    spilled = {(x["kernel"], x["N"], x["plain"]): x["stack"] for x in compiled if x["stack"]}
    assert spilled in ({}, {("sorted_rows", 1024, True): 8})
    for kernel in compiled:
        assert kernel["local"] == 0, kernel
        # Registers are given out to warps in units of 256.
        warp = -(-32 * kernel["registers"] // 256) * 256
        used = kernel["programs_per_processor"] * (kernel["threads"] // 32) * warp
        assert used <= REGISTERS, kernel


@pytest.mark.parametrize("method", ["sort", "bin"])
def test_compiled_tensors_have_the_dtypes_of_a_launch(compiled: list[dict[str, Any]], method: str) -> None:
    v, t = torch.empty(2, 64, 8, device="meta", requires_grad=True)
    with mock.patch.object(launching, "launch") as launch:
        rankloss.RankClipLoss(schedule="constant", method=method, kernel="triton")(v, t, 10.0)
    kernel = {"sort": "sorted_rows", "bin": "binned_rows"}[method]
    calls = [call.args for call in launch.call_args_list if call.args[0].endswith(f".{kernel}")]
    kinds = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    passed = [kinds[x.dtype] for x in calls[0][2]]  # by the cross-modal term, with CLIP's loss
    assert [x["tensors"] for x in compiled if x["kernel"] == kernel] == [passed] * 4
