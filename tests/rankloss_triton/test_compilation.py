"""Registers and spills of the kernels, without a GPU."""

from __future__ import annotations

import json
import math
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
REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32  # of a multiprocessor of Hopper, at most
SHARED_BYTES = 228 * 1024  # of its memory, of which each program takes 1,024 beside its own


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Both kernels for lists of two lengths, plain and with further options."""
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this build of Triton has no NVIDIA assembler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, HERE / "compile_kernels.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(kernels) == 2 * 2 * 2  # by the kernel, the length, and whether it is plain
    return kernels


def test_two_registers_spill_in_one_kernel_or_none(compiled: list[dict[str, Any]]) -> None:
    """On Hopper, as the runtime compiles: the sorting kernel, plain, spills at 1,024 items."""
    bytes_of_stack = {
        (kernel["kernel"], kernel["N"], kernel["plain"]): kernel["stack"]
        for kernel in compiled
        if kernel["stack"]
    }
    two_registers = 2 * 4  # bytes
    # Empty where Triton's assembler is another version's.
    assert bytes_of_stack in ({}, {("sorted_rows", 1024, True): two_registers})
    # The other place to spill to.
    assert [kernel for kernel in compiled if kernel["local"]] == []


def test_the_programs_of_a_launch_fit_together_on_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        # A warp of 32 threads gets its registers in units of 256.
        registers_of_a_warp = 256 * math.ceil(32 * kernel["registers"] / 256)
        warps = kernel["programs_per_processor"] * kernel["threads"] // 32
        assert warps * registers_of_a_warp <= REGISTERS, kernel
        assert warps <= WARPS, kernel
        programs = kernel["programs_per_processor"]
        assert programs <= PROGRAMS, kernel
        assert programs * (1024 + kernel["shared"]) <= SHARED_BYTES, kernel


@pytest.mark.parametrize("method", ["sort", "bin"])
def test_compiled_tensors_have_the_dtypes_of_a_launch(compiled: list[dict[str, Any]], method: str) -> None:
    v, t = torch.empty(2, 64, 8, device="meta", requires_grad=True)
    with mock.patch.object(launching, "launch") as launch:
        rankloss.RankClipLoss(schedule="constant", method=method, kernel="triton")(v, t, 10.0)
    kernel = {"sort": "sorted_rows", "bin": "binned_rows"}[method]
    launches = [call.args for call in launch.call_args_list if call.args[0].endswith(f".{kernel}")]
    _name, _programs, tensors, *_ = launches[0]  # of the cross-modal term, with CLIP's loss
    pointers = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    passed = [pointers[tensor.dtype] for tensor in tensors]
    of_method = [each["tensors"] for each in compiled if each["kernel"] == kernel]
    assert of_method == [passed] * 4  # two lengths, plain or not
