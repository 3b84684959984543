"""Kernel launches, and the search for Triton, which only the first launch imports."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DISTRIBUTIONS = (
    *("triton", "pytorch-triton", "triton-windows"),
    *("pytorch-triton-rocm", "triton-rocm"),  # AMD's, up to and after torch 2.10
)
EARLIEST_TRITON = "3.4"
"""In the interpreter of earlier ones the kernels corrupt memory."""


def launch(name: str, programs: int, tensors: Sequence[Tensor | None], *sizes: int, **options: Any) -> None:
    """Launch a kernel of :mod:`rankloss_triton.device` on the device of its tensors; on meta, do nothing.

    Args:
        name: module and function, such as ``"sorted_rows.sorted_rows"``.
        programs: their number.
        tensors: the kernel's first arguments; the first of them is on the device of the launch.
        *sizes: the kernel's next arguments.
        **options: the kernel's compile-time arguments and Triton's own.
    """
    assert tensors[0] is not None
    if tensors[0].device.type == "meta":
        return
    module, _, function = name.partition(".")
    kernel = getattr(importlib.import_module(f"rankloss_triton.device.{module}"), function)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, *sizes, **options)


def is_interpreted() -> bool:
    """True where Triton interprets its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, which is not imported; None without one of the known distributions."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None
