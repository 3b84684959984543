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
from trainer_runs import RANKCLIP_OFFICIAL, STEPS, Run, Runs, Trainer, assert_equal_training

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
THIRD_PARTY = Path(__file__).parent / "third_party_loss"


def pip(*arguments: str, python: str = sys.executable) -> None:
    """Run this environment's pip for the environment of an interpreter."""
    command = [sys.executable, "-m", "pip", "--python", python, "--quiet", *arguments]
    subprocess.run(command, check=True, timeout=300)


def new_environment(directory: Path) -> tuple[str, Path]:
    """Make an environment without packages: its interpreter, and the folder of its packages."""
    venv.create(directory, symlinks=True)
    (site_packages,) = directory.glob("lib/python*/site-packages")
    return str(directory / "bin" / "python"), site_packages


def check_third_party(run: Run) -> None:
    """Check two epochs of ``--loss uniform --uniform-weight 0.5``, the loss of ``third_party_loss``.

    It is told of every optimizer step: its weight grows linearly to 0.5. The weight is logged, not trained.
    """
    (line,) = set(re.findall(r"Loss: uniform .*", run.log))
    assert line.startswith("Loss: uniform (uniform-clip 1.2), weight 0.5, open_clip ")
    assert run.params["uniform_weight"] == "0.5"
    scalars, steps = run.scalars, 2 * STEPS
    weights = {step: 0.5 * (step + 1) / steps for step in range(steps)}
    assert scalars["uniform_weight"] == pytest.approx(weights)
    for step in range(steps):
        assert scalars["uniform_loss"][step] < 0
        total = scalars["contrastive_loss"][step] + scalars["uniform_loss"][step]
        assert scalars["loss"][step] == pytest.approx(total, rel=1e-6)


def test_wheels_train_in_a_fresh_environment_and_leave_no_file(
    trainer: Trainer, runs: Runs, tmp_path: Path
) -> None:
    """Against a run of the editable installation, to the bit and line by line."""
    directory = tmp_path / "environment"
    python, site_packages = new_environment(directory)
    without_path = {"PYTHONPATH": ""}
    # After the environment's own come this one's packages; its .pth files (editable installs) are not read.
    (site_packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"])
    files_before = set(directory.rglob("*"))
    # Without isolation pip builds by this environment's hatchling, of the test extra.
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    pip(*build, str(ROOT), str(THIRD_PARTY))
    wheels = [str(path) for path in tmp_path.glob("*.whl")]
    assert len(wheels) == 2
    pip("install", "--no-deps", *wheels, python=python)
    print_files = "import rankloss_open_clip, rankloss; print(rankloss_open_clip.__file__, rankloss.__file__)"
    imported = trainer.python("-c", print_files, executable=python, **without_path).output.split()
    assert len(imported) == 2
    assert all(Path(file).is_relative_to(directory) for file in imported)

    run = trainer.run("wheel", "--epochs", "3", *RANKCLIP_OFFICIAL, executable=python, **without_path)
    assert_equal_training(runs["--loss rankclip"], run)
    assert run.timeless_log == runs["--loss rankclip"].timeless_log
    options = ["--loss", "uniform", "--uniform-weight", "0.5", "--epochs", "2"]
    check_third_party(trainer.run("uniform", *options, executable=python, **without_path))

    pip("uninstall", "--yes", "rankloss", "uniform-clip", python=python)
    assert set(directory.rglob("*")) == files_before


def test_the_error_of_a_clone_that_is_gone_names_the_command_that_mends_it(tmp_path: Path) -> None:
    """rankloss is a plug-in of torch, which an import of torch loads: without the clone it fails.

    The environment shares all other packages with this one, by links.
    """
    clone = tmp_path / "clone"
    for name in ("rankloss", "integrations", "tools"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    python, site_packages = new_environment(tmp_path / "environment")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        is_of_rankloss = path.name.startswith(("rankloss", "_rankloss"))
        is_editable_install = path.suffix == ".pth"
        if not is_of_rankloss and not is_editable_install:
            (site_packages / path.name).symlink_to(path)
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(clone), python=python)

    def import_in_environment(module: str) -> subprocess.CompletedProcess[str]:
        """Import a module in a process of the environment, which prints the module's file."""
        command = [python, "-c", f"import {module}; print({module}.__file__)"]
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path, check=False)

    assert str(clone) in import_in_environment("rankloss").stdout
    shutil.rmtree(clone)
    of_torch = import_in_environment("torch")
    assert of_torch.returncode != 0
    error = of_torch.stderr.splitlines()[-1]
    named_command = re.search(r"\(.* pip (uninstall rankloss)\)", error)
    assert named_command is not None, error
    pip(*named_command[1].split(), "--yes", python=python)
    assert import_in_environment("torch").returncode == 0
