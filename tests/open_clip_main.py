"""A snapshot of open_clip's main branch, which is not released, if there is one beside the checkout."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNAPSHOT = Path(
    os.environ.get("RANKLOSS_OPEN_CLIP_MAIN", ROOT.parent / "shared" / "peers" / "open_clip-main.tar.gz")
)


def unpacked(directory: Path) -> str:
    """A PYTHONPATH on which the snapshot comes first; a test that asks without one is skipped.

    Unless it is named: CI does so, where nothing is to be skipped.
    """
    if not SNAPSHOT.exists() and "RANKLOSS_OPEN_CLIP_MAIN" not in os.environ:
        pytest.skip(f"there is no snapshot of open_clip's main branch: {SNAPSHOT}")
    with tarfile.open(SNAPSHOT) as archive:
        archive.extractall(directory, filter="data")
    return os.pathsep.join([str(directory / "open_clip" / "src"), *filter(None, sys.path)])
