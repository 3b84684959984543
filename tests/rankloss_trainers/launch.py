"""Runs a test file as a script, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(file: str, *arguments: object, processes: int = 2, path: str = "", **environment: str) -> None:
    """Start a file, several processes under torchrun, and fail with what it has said if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    launcher = launcher if processes > 1 else []
    paths = [path, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    given = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *launcher, file, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
