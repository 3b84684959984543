"""Launches of kernels: Triton is found without importing it, and imported by the first launch."""

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

EARLIEST_TRITON = "3.4"
"""In the interpreter of earlier ones the kernels corrupt memory."""


def launch(name: str, programs: int, tensors: Sequence[Tensor | None], *sizes: int, **options: Any) -> None:
    """Launch a kernel of :mod:`rankloss_triton.device` where its tensors are; on meta, nothing.

    Args:
        name: module and function, such as ``"sorted_rows.sorted_rows"``.
        programs: how many run.
        tensors: the kernel's first arguments, the first of which is on the device that launches.
        *sizes: its next arguments.
        **options: its compile-time arguments, and Triton's own.
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
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_version() -> str | None:
    """The version of the Triton that is installed, None without one; it is not imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None
