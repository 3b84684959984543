"""The wheel in an environment of its own: it trains there, and leaves nothing behind."""

from __future__ import annotations

import shutil
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT))
    (file,) = directory.glob("rankloss-*.whl")
    return str(file)


def test_wheel_trains_in_a_fresh_environment_and_leaves_no_file(
    wheel: str, trainer: Trainer, runs: Runs, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    pip("install", "--no-deps", wheel, python=environment.python)
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


def test_environment_whose_clone_is_gone_cannot_import_torch_until_it_is_mended(
    wheel: str, trainer: Trainer, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "environment")
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "outputs", "examples"))
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(clone), python=environment.python)
    clean = {"executable": environment.python, "PYTHONPATH": ""}
    import_torch = "import torch; from rankloss_open_clip import bootstrap; print(bootstrap.__file__)"
    assert Path(trainer.python("-c", import_torch, **clean).output.strip()).is_relative_to(clone)

    clone.rename(tmp_path / "moved")
    run = trainer.python("-c", "import torch", **clean)
    assert run.returncode != 0
    assert "Failed to load the backend extension: rankloss_open_clip" in run.output
    assert trainer.python("-c", "import torch", TORCH_DEVICE_BACKEND_AUTOLOAD="0", **clean).returncode == 0

    pip("install", "--no-deps", "--force-reinstall", wheel, python=environment.python)
    run = trainer.python("-c", import_torch, **clean)
    assert Path(run.output.strip()).is_relative_to(environment.directory)
