"""Files that are made once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a file's content; what is not there is made and written, whole or not at all."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        torch.save(make(), partial)
        partial.replace(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found
