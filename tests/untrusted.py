"""A pickle that runs code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Pickled:
    """An object that makes a folder where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.made,)
