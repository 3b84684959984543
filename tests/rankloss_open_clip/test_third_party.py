"""A third-party package, installed with pip, whose loss the unmodified command trains with."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from trainer_runs import STEPS, Trainer

from rankloss_trainers import catalog

pytestmark = pytest.mark.slow

PACKAGE = Path(__file__).parent / "third_party_loss"


@pytest.fixture(scope="module")
def installed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which a process finds the package, and two more that are unusable."""
    site = tmp_path_factory.mktemp("site")
    # Offline, and with what is installed: hatchling comes with the test extra.
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = trainer.python("-m", "pip", "install", *flags, "--target", str(site), str(PACKAGE))
    assert done.returncode == 0, done.output
    for name, reference in (("broken", "broken_module:LOSS"), ("rankclip", "uniform_clip:UNIFORM")):
        directory = site / f"{name}_package-0.1.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 0.1\n")
        (directory / "entry_points.txt").write_text(f"[{catalog.GROUP}]\n{name} = {reference}\n")
    (site / "broken_module.py").write_text("raise OSError('sabotaged')\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


def test_registered_loss_trains(trainer: Trainer, installed: dict[str, str]) -> None:
    options = ["--loss", "uniform", "--uniform-weight", "0.5", "--epochs", "2"]
    run = trainer.run("uniform", *options, **installed)
    assert run.returncode == 0, run.output[-4000:]
    (line,) = re.findall(r"Loss: uniform .*", run.log)
    assert line.startswith("Loss: uniform (uniform-clip 1.2) on ClipLoss, weight up to 0.5, open_clip ")
    assert "uniform_clip:UNIFORM is registered as a loss under the name 'rankclip'" in run.output
    assert "sabotaged" not in run.output
    assert run.params["uniform_weight"] == "0.5"
    shown, steps = run.scalars, range(2 * STEPS)
    assert len(run.train_lines()) == len(steps)
    # It is told of every optimizer step; the weight is logged and not trained.
    assert shown["uniform_weight"] == pytest.approx({i: 0.5 * (i + 1) / len(steps) for i in steps})
    for i in steps:
        assert shown["uniform_loss"][i] < 0
        total = shown["contrastive_loss"][i] + shown["uniform_loss"][i]
        assert shown["loss"][i] == pytest.approx(total, rel=1e-6)


def test_broken_loss_ends_with_a_usage_error(trainer: Trainer, installed: dict[str, str]) -> None:
    done = trainer.python("-m", "open_clip_train.main", "--loss", "broken", **installed)
    assert done.returncode == 2
    message = "argument --loss: broken (broken-package 0.1) cannot be used: OSError: sabotaged"
    assert message in done.output
