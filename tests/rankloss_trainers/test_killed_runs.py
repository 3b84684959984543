"""A training that is killed, also within a save, and resumed ends with the bits of the one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from killed_runs import TRAINERS

TESTS = Path(__file__).parents[1]
KILLS = 10


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["random", "writes"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_killed_ten_times_and_resumed_is_the_uninterrupted_one(
    tmp_path: Path, trainer: str, kills: str
) -> None:
    """Killed at ``random`` moments, or in the middle of a file that a save ``writes``.

    It is resumed from the last checkpoint that the trainer has written whole, which Lightning does at the
    end of an epoch. All trainings are forks of ``killed_runs.py``, which compares their tensors.
    """
    if trainer != "loop" and find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed")
    folders = [str(TESTS), str(TESTS / "tiny_package"), str(TESTS / "rankloss_trainers")]
    if "PYTHONPATH" in os.environ:
        folders.append(os.environ["PYTHONPATH"])
    file = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(file), trainer, str(tmp_path), str(KILLS), kills],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if "RESULT" in line]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    assert len(results) == KILLS
    for result in results:
        if kills == "writes":  # at a random moment, the training may have ended before
            assert result["killed"] == -signal.SIGKILL, "its exit code"
        assert result["resumed"] == 0, (result, done.stderr[-4000:])
        assert result["unequal"] == [], result
