"""The wheel in an environment of its own: it trains there, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from trainer_runs import OFFICIAL, Runs, Trainer, assert_equal_training

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def pip(*arguments: str, python: str = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "--quiet", *arguments]
    subprocess.run(command, check=True, timeout=300)


class Environment:
    """A new environment that sees the packages of this one, but not this one's rankloss."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        venv.create(directory, symlinks=True)
        self.python = str(directory / "bin" / "python")
        (site_packages,) = directory.glob("lib/python*/site-packages")
        # It comes after the environment's own packages; .pth files in it (editable installs) are not read.
        (site_packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"])

    def files(self) -> set[Path]:
        return {path.relative_to(self.directory) for path in self.directory.rglob("*")}


def test_wheel_trains_in_a_fresh_environment_and_leaves_no_file(
    trainer: Trainer, runs: Runs, tmp_path: Path
) -> None:
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("rankloss-*.whl")
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    pip("install", "--no-deps", str(wheel), python=environment.python)
    assert len(environment.files() - before) > 20

    where = "import rankloss_open_clip, rankloss; print(rankloss_open_clip.__file__, rankloss.__file__)"
    clean = {"executable": environment.python, "PYTHONPATH": ""}
    for file in trainer.python("-c", where, **clean).output.split():
        assert Path(file).is_relative_to(environment.directory)

    run = trainer.run("wheel", "--epochs", "3", *OFFICIAL, **clean)
    assert run.returncode == 0, run.output[-4000:]
    assert_equal_training(runs["--loss rankclip"], run)
    assert run.timeless_log == runs["--loss rankclip"].timeless_log

    pip("uninstall", "--yes", "rankloss", python=environment.python)
    assert environment.files() == before
