"""A third-party package, installed with pip, whose losses the unmodified command trains with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_runs import STEPS, Processes, Run, Runs, Trainer, assert_equal_training

import rankloss
from rankloss_trainers import catalog

PACKAGE = Path(__file__).parent / "third_party_loss"


@pytest.fixture(scope="module")
def installed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which a process finds the package, and two more that are unusable."""
    site = tmp_path_factory.mktemp("site")
    # Offline, and with what is installed: hatchling comes with the test extra.
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = trainer.python("-m", "pip", "install", *flags, "--target", str(site), str(PACKAGE))
    assert done.returncode == 0, done.output
    write_distribution(site, "broken", "broken_module:LOSS")
    (site / "broken_module.py").write_text("raise OSError('sabotaged')\n")
    write_distribution(site, "cyclip", "uniform_clip:UNIFORM")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


def write_distribution(site: Path, name: str, reference: str) -> None:
    """Metadata as pip writes it for a package that registers a loss."""
    directory = site / f"{name}_package-0.1.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 0.1\n")
    (directory / "entry_points.txt").write_text(f"[{catalog.GROUP}]\n{name} = {reference}\n")


@pytest.fixture(scope="module")
def runs_with_it(trainer: Trainer, installed: dict[str, str]) -> Iterator[Runs]:
    runs = Runs()
    uniform = ["--loss", "uniform", "--uniform-weight", "0.5", "--epochs", "2"]
    runs.add("uniform", trainer.run, "uniform", *uniform, **installed)
    former = ["--loss", "uniform-former", "--uniform-former-weight", "0.5", "--epochs", "2"]
    runs.add("uniform-former", trainer.run, "uniform-former", *former, **installed)
    runs.add(
        "cyclip beside it", trainer.run, "cyclip beside it", "--loss", "cyclip", "--epochs", "1", **installed
    )
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def commands(trainer: Trainer, installed: dict[str, str]) -> Iterator[Processes]:
    table = Processes()
    main = ("-m", "open_clip_train.main")
    table.add("help", trainer.python, *main, "--help", COLUMNS="400", **installed)
    table.add("broken", trainer.python, *main, "--loss", "broken", **installed)
    table.add("doctor", trainer.python, "-m", "rankloss_open_clip.doctor", **installed)
    table.add("refused", trainer.python, *main, "--loss", "uniform-former", "--batch-size", "2", **installed)
    yield table
    table.close()


def test_registered_loss_trains(runs_with_it: Runs) -> None:
    run: Run = runs_with_it["uniform"]
    (line,) = re.findall(r"Loss: uniform .*", run.log)
    assert line.startswith("Loss: uniform (uniform-clip 1.2) on ClipLoss, weight up to 0.5, open_clip ")
    shown = run.scalars
    assert len(run.train_lines()) == 2 * STEPS
    steps = range(2 * STEPS)
    # It is told of every optimizer step; the weight is logged and not trained.
    assert shown["uniform_weight"] == pytest.approx({i: 0.5 * (i + 1) / (2 * STEPS) for i in steps})
    for i in steps:
        assert shown["uniform_loss"][i] < 0
        assert shown["loss"][i] == pytest.approx(
            shown["contrastive_loss"][i] + shown["uniform_loss"][i], rel=1e-6
        )
    assert run.params["uniform_weight"] == "0.5"


def test_loss_registered_by_the_former_signature_trains_the_same(runs_with_it: Runs) -> None:
    former, today = runs_with_it["uniform-former"], runs_with_it["uniform"]
    (line,) = re.findall(r"Loss: uniform-former .*", former.log)
    assert "(uniform-clip 1.2) on ClipLoss, weight up to 0.5, open_clip " in line
    assert_equal_training(today, former, epochs=(1, 2))
    assert former.timeless_log == today.timeless_log


def test_other_losses_do_not_depend_on_what_else_is_installed(runs_with_it: Runs) -> None:
    run = runs_with_it["cyclip beside it"]
    assert f"Loss: cyclip (rankloss {rankloss.__version__})" in run.log
    assert "sabotaged" not in run.output
    assert (
        "uniform_clip:UNIFORM is registered as a loss under the name 'cyclip', which is taken" in run.output
    )
    weights = torch.cat([value.flatten() for value in run.epoch(1).values() if value.is_floating_point()])
    assert weights.isfinite().all()


def test_help_lists_all_losses_and_says_what_is_wrong_with_them(commands: Processes) -> None:
    done = commands["help"]
    assert done.returncode == 0
    text = " ".join(done.output.split())
    names = ",".join(("clip", *catalog.BUILT_IN, "broken", "uniform", "uniform-former"))
    assert f"--loss {{{names}}}" in text
    assert "uniform: the trainer's own plus a uniformity term" in text
    assert "--uniform-weight X weight of the term (default: 0.1)" in text
    assert "broken: cannot be used (OSError: sabotaged)" in text


def test_what_is_broken_or_refused_ends_with_a_usage_error(commands: Processes) -> None:
    for name, message in (
        ("broken", "argument --loss: broken (broken-package 0.1) cannot be used: OSError: sabotaged"),
        ("refused", "argument --loss: uniform needs at least three pairs"),
    ):
        assert commands[name].returncode == 2
        assert message in commands[name].output


def test_doctor_tells_what_other_packages_register(commands: Processes) -> None:
    done = commands["doctor"]
    assert done.returncode == 0
    assert "--loss uniform (uniform-clip 1.2) can be used as well." in done.output
    assert "--loss broken (broken-package 0.1) cannot be used: OSError: sabotaged." in done.output
    assert (
        "uniform_clip:UNIFORM is registered as a loss under the name 'cyclip', which is taken." in done.output
    )
