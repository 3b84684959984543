"""Versions and hardware, for records."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def conditions(packages: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Return the versions of packages, given by their names here, the processor, and ``more``."""
    return {
        **{name: importlib.metadata.version(package) for name, package in packages.items()},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        **more,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
