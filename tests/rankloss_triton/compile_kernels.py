"""Compiles both kernels for a GPU that need not be there, by Triton's own assembler; prints JSON.

Run as a script, since a process whose Triton interprets cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankloss_triton.device.binned_rows import binned_rows
from rankloss_triton.device.sorted_rows import sorted_rows
from rankloss_triton.rows import _DEEPEST, choose_launch

POINTERS = {"INTS": "*i32", "TOTALS": "*i64", "EQUAL": "*i64"}
FLOATS = ("X", "Y", "GRADIENT", "CE", "NLL", "FLOATS", "scale", "ALPHA", "BETA")
CAPABILITY, PROCESSORS = 90, 132  # of Hopper
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(bins: int, N: int, plain: bool) -> dict[str, Any]:
    """Compile a kernel for lists of N items, and return its registers, spilled bytes and launch.

    Args:
        bins: The number of bins; 0 for the kernel that sorts.
        N: The items of a list.
        plain: True with the own pair and without ``top_k``.
    """
    kernel = binned_rows if bins else sorted_rows
    many_lists = 4096  # enough for as many programs as fit on the card
    launch = choose_launch(many_lists, N, bins, PROCESSORS)
    constants = {
        "BLOCK": launch.block,
        "DEEPEST": _DEEPEST,
        "OPPOSITE": True,
        "HAS_ALPHA": True,
        "HAS_GRADIENT": True,
        "DIAGONAL": plain,
        "WEIGHS": not plain,
        "MEAN": True,
    }
    names = kernel.arg_names
    floats, constant_arguments = dict.fromkeys(FLOATS, "*fp32"), dict.fromkeys(constants, "constexpr")
    kinds = {**floats, **POINTERS, **constant_arguments}
    signature = {name: kinds.get(name, "i32") for name in names}
    # The runtime tells the compiler that tensors, and lists of such lengths, begin at multiples of 16 bytes.
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name == "N"]
    source = ASTSource(
        kernel,
        signature=signature,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
    )
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    registers, stack, local = resource_usage(compiled.asm["cubin"])
    return {
        "kernel": kernel.fn.__name__,
        "N": N,
        "plain": plain,
        "threads": 32 * launch.warps,
        "programs_per_processor": launch.programs // PROCESSORS,
        "tensors": [kind for kind in signature.values() if kind.startswith("*")],
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
    }


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """The registers of a thread, and its bytes of stack and of local memory, to which others are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    return int(registers), int(stack), int(local)


if __name__ == "__main__":
    cases = [(bins, N, plain) for bins in (0, 2048) for N in (1024, 8192) for plain in (True, False)]
    json.dump([compile_kernel(*case) for case in cases], sys.stdout)
