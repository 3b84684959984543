"""Image–name pairs from Iconify's icon sets, built by ``python -m studies.icons``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

SETS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_text(encoding="utf-8"))


def built(folder: Path) -> Any:
    """Return the icons of a folder, built there if they are missing.

    Raises:
        RuntimeError: If the build fails; it has said why.
    """
    from .load import load

    if not (folder / "manifest.json").is_file():
        command = [sys.executable, "-m", "studies.icons", "--output", str(folder)]
        if subprocess.run(command, check=False).returncode != 0:
            raise RuntimeError(f"building the icons failed: {' '.join(command)}")
    return load(folder)
