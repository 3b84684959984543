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
@pytest.mark.parametrize("kind", ["random", "writes"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_killed_ten_times_and_resumed_is_the_uninterrupted_one(
    tmp_path: Path, trainer: str, kind: str
) -> None:
    """At random moments, and in the middle of a file that a save writes.

    From the last checkpoint that the trainer has written whole; Lightning's at the end of an epoch.
    """
    if trainer != "loop" and find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed")
    path = [str(TESTS), str(TESTS / "tiny_package"), str(TESTS / "rankloss_trainers")]
    paths = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    file = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(file), trainer, str(tmp_path), str(KILLS), kind],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(x.removeprefix("RESULT ")) for x in done.stdout.splitlines() if "RESULT" in x]
    assert len(results) == KILLS
    for result in results:
        assert kind == "random" or result["killed"] == -signal.SIGKILL
        assert result["resumed"] == 0, (result, done.stderr[-4000:])
        assert result["unequal"] == [], result
