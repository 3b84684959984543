"""Resident memory of this process, on Linux."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path


def added_bytes(call: Callable[[], object]) -> int:
    """The peak of resident memory during a call, above what was resident before."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":  # what is freed and still resident would hide as much of the peak
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
