"""Runs a test file as a script, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(file: str, *arguments: object, processes: int = 2, path: str = "", **environment: str) -> None:
    """Start a file, several processes under torchrun, and fail with the end of its errors if it fails.

    Args:
        file: The script.
        arguments: Its command line.
        processes: How many; one is started without torchrun.
        path: A folder from which the script imports, beside the tests.
        environment: Variables.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    command = [sys.executable, *(launcher if processes > 1 else []), file, *map(str, arguments)]
    folders = [path, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
