"""The wheel in an environment of its own, and a third party's: both train there, and leave nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from trainer_runs import OFFICIAL, STEPS, Run, Runs, Trainer, assert_equal_training

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
THIRD_PARTY = Path(__file__).parent / "third_party_loss"


def pip(*arguments: str, python: str = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "--quiet", *arguments]
    subprocess.run(command, check=True, timeout=300)


def check_third_party(run: Run) -> None:
    (line,) = set(re.findall(r"Loss: uniform .*", run.log))
    assert line.startswith("Loss: uniform (uniform-clip 1.2), weight 0.5, open_clip ")
    assert run.params["uniform_weight"] == "0.5"
    # It is told of every optimizer step; the weight is logged and not trained.
    shown, steps = run.scalars, range(2 * STEPS)
    assert shown["uniform_weight"] == pytest.approx({i: 0.5 * (i + 1) / len(steps) for i in steps})
    for i in steps:
        assert shown["uniform_loss"][i] < 0
        total = shown["contrastive_loss"][i] + shown["uniform_loss"][i]
        assert shown["loss"][i] == pytest.approx(total, rel=1e-6)


def test_wheels_train_in_a_fresh_environment_and_leave_no_file(
    trainer: Trainer, runs: Runs, tmp_path: Path
) -> None:
    directory = tmp_path / "environment"
    venv.create(directory, symlinks=True)
    python, clean = str(directory / "bin" / "python"), {"PYTHONPATH": ""}
    (site_packages,) = directory.glob("lib/python*/site-packages")
    # After the environment's own come this one's packages; its .pth files (editable installs) are not read.
    (site_packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"])
    before = set(directory.rglob("*"))
    # With what is installed: hatchling comes with the test extra.
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    pip(*build, str(ROOT), str(THIRD_PARTY))
    wheels = [str(path) for path in tmp_path.glob("*.whl")]
    assert len(wheels) == 2
    pip("install", "--no-deps", *wheels, python=python)
    where = "import rankloss_open_clip, rankloss; print(rankloss_open_clip.__file__, rankloss.__file__)"
    for file in trainer.python("-c", where, executable=python, **clean).output.split():
        assert Path(file).is_relative_to(directory)

    run = trainer.run("wheel", "--epochs", "3", *OFFICIAL, executable=python, **clean)
    assert_equal_training(runs["--loss rankclip"], run)
    assert run.timeless_log == runs["--loss rankclip"].timeless_log
    options = ["--loss", "uniform", "--uniform-weight", "0.5", "--epochs", "2"]
    check_third_party(trainer.run("uniform", *options, executable=python, **clean))

    pip("uninstall", "--yes", "rankloss", "uniform-clip", python=python)
    assert set(directory.rglob("*")) == before
