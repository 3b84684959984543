"""The wheel in an environment of its own, and a third party's: both train there, and leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
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


def test_the_error_of_a_clone_that_is_gone_names_the_command_that_mends_it(tmp_path: Path) -> None:
    """In an environment that shares all other packages with this one."""
    clone, directory = tmp_path / "clone", tmp_path / "environment"
    for name in ("rankloss", "integrations", "tools"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    venv.create(directory, symlinks=True)
    python = str(directory / "bin" / "python")
    (site_packages,) = directory.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("rankloss", "_rankloss")) and path.suffix != ".pth":
            (site_packages / path.name).symlink_to(path)
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(clone), python=python)

    def imported(module: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-c", f"import {module}; print({module}.__file__)"]
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path, check=False)

    assert str(clone) in imported("rankloss").stdout
    shutil.rmtree(clone)
    said = imported("torch").stderr.splitlines()[-1]
    command = re.search(r"\((?:.*) pip (uninstall rankloss)\)", said)
    assert command is not None, said
    pip(*command[1].split(), "--yes", python=python)
    assert imported("torch").returncode == 0
