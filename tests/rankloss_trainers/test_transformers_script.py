"""``python -m rankloss_trainers.transformers SCRIPT``: a script that knows nothing of rankloss."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from counting import LOSSES_AND_FOLDERS, count_calls
from rankloss import schedules
from rankloss_trainers.transformers.__main__ import main, parse
from registered import TINY_PACKAGE

SCRIPT = Path(__file__).parent / "contrastive_script.py"
RUNNER = ("-m", "rankloss_trainers.transformers")
LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1", "--quiet")
ENTRIES = {"contrastive_loss", "cross_modal_loss", "in_modal_loss", "rank_lambda"}
"""What a line of the log has of rankclip beside the sum of its terms."""


def command_line(directory: Path, *argv: str, **changes: Any) -> list[str]:
    given = {
        **{"output_dir": directory, "do_train": True, "do_eval": True, "use_cpu": True, "report_to": "none"},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "seed": 1},
        **{"save_strategy": "no", "remove_unused_columns": False, "dataloader_pin_memory": False},
        **changes,
    }
    return [str(SCRIPT), *(str(part) for name, x in given.items() for part in (f"--{name}", x)), *argv]


def started(launcher: tuple[str, ...], directory: Path, *argv: str, **changes: Any) -> Path:
    """Run the script in a process of its own."""
    path = os.pathsep.join(filter(None, [str(TINY_PACKAGE), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory)}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, *command_line(directory, *argv, **changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the script in this process, by the runner or without it, and returns its folder.

    The runner changes the Trainer, torch's hooks and the paths of imports, which the test puts back.
    """
    for module in (transformers, importlib.import_module("transformers.trainer")):
        monkeypatch.setattr(module, "Trainer", module.Trainer)
    monkeypatch.setenv("HF_HUB_CACHE", "")  # which the script sets
    optimizers: Any = importlib.import_module("torch.optim.optimizer")
    hooks = "_global_optimizer_pre_hooks"
    monkeypatch.setattr(optimizers, hooks, getattr(optimizers, hooks).copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())

    def run(directory: Path, *argv: str, by_runner: bool = True, **changes: Any) -> Path:
        script, *rest = command_line(directory, *argv, **changes)
        monkeypatch.setattr(sys, "argv", ["runner", script, *rest] if by_runner else [script, *rest])
        if by_runner:
            main()
        else:
            runpy.run_path(script, run_name="__main__")
        return directory

    return run


def history(directory: Path) -> list[dict[str, float]]:
    """The lines of the script's log that are of training steps."""
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [line for line in log if "loss" in line]


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the script with RankCLIP's loss, in a process of its own."""
    directory = tmp_path_factory.mktemp("ranked")
    return started(RUNNER, directory, "--loss", "rankclip", "--rankclip-lambda-in", "0.5")


@pytest.mark.slow
def test_the_trainers_own_loss_trains_as_without_the_runner(
    tmp_path: Path, run_script: Callable[..., Path]
) -> None:
    plain = run_script(tmp_path / "plain", by_runner=False)
    with_clip = run_script(tmp_path / "clip", "--loss", "clip")  # the trainer's own
    assert weights(with_clip) == weights(plain)
    assert "contrastive_loss" not in history(with_clip)[0], "an entry that rankloss's losses log"


@pytest.mark.slow
def test_a_loss_begins_at_the_scripts_own_and_trains_other_weights(
    tmp_path: Path, run_script: Callable[..., Path], ranked: Path
) -> None:
    plain = run_script(tmp_path, by_runner=False)
    first_contrastive = history(ranked)[0]["contrastive_loss"]
    assert first_contrastive == pytest.approx(history(plain)[0]["loss"], rel=1e-4)
    assert weights(ranked) != weights(plain)


@pytest.mark.slow
def test_the_script_logs_the_schedule_and_the_option_that_was_typed(ranked: Path) -> None:
    lines = history(ranked)
    expected = [schedules.rankclip(step, 8) for step in range(1, 9)]
    assert [line["rank_lambda"] for line in lines] == pytest.approx(expected)
    last = lines[-1]
    lambda_in, normalizer = 0.5, 1 / 16  # typed in ranked; the default of RankClipLoss
    weighted = lambda_in * normalizer * last["rank_lambda"] * last["in_modal_raw"]
    assert last["in_modal_loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.mark.slow
def test_the_script_evaluates(ranked: Path) -> None:
    assert "eval_loss" in json.loads((ranked / "eval_results.json").read_text())


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (("--trainer", "none"), SystemExit, "--loss rankclip was not used"),
        (("--trainer", "loop"), RuntimeError, "--loss rankclip was not used"),
        (("--trainer", "OwnLoss"), RuntimeError, "loss rankclip was not used: OwnLoss .*compute_loss"),
        (("--trainer", "OwnStep"), RuntimeError, "loss rankclip was not used: OwnStep .*compute_loss"),
        (("--kind", "other"), ValueError, "Classifier has neither a logit_scale nor a temperature"),
    ],
    ids=["no trainer", "a loop of its own", "a loss of its own", "a step of its own", "no CLIP"],
)
def test_a_script_that_does_not_train_the_loss_fails_and_saves_no_model(
    tmp_path: Path, run_script: Callable[..., Path], argv: tuple[str, ...], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        run_script(tmp_path, "--loss", "rankclip", *argv)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_own_compute_loss_that_calls_super_logs_the_entries_of_the_loss(
    tmp_path: Path, run_script: Callable[..., Path]
) -> None:
    directory = run_script(tmp_path, "--loss", "rankclip", "--trainer", "WrappedLoss", max_steps=1)
    first_line = history(directory)[0]
    assert first_line.keys() >= ENTRIES


def test_derived_trainer_is_reached_by_a_loss_that_is_chosen_and_built_once(
    tmp_path: Path, run_script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, **LOSSES_AND_FOLDERS)
    typed = ("--loss", "rankclip", "--loss-agreement-every", "2", "--trainer", "Derived")
    directory = run_script(tmp_path, *typed, max_steps=1)
    assert calls == {"choose": 1, "build": 1}
    assert history(directory)[0].keys() >= {*ENTRIES, "cross_modal_tau"}


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path: Path) -> None:
    lines = history(started((*LAUNCH, *RUNNER), tmp_path, "--loss", "tiny"))
    assert len(lines) == 8, "two epochs of four batches"
    assert all("tiny_loss" in line for line in lines)


# --- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "chosen", "rest"),
    [
        pytest.param("--a -- --los -x", None, "--a -- --los -x", id="no loss"),
        pytest.param("--a --loss clip -x", None, "--a -x", id="the trainer's own loss"),
        pytest.param(
            "--loss rankclip --loss_type x -- --loss_teacher",
            ("rankclip", {}),
            "--loss_type x -- --loss_teacher",
            id="options of the script that begin with --loss",
        ),
        pytest.param(
            "--a -1 --loss rankclip x --rankclip-top-k=3 --b=--loss --lo y",
            ("rankclip", {"top_k": 3}),
            "--a -1 x --b=--loss --lo y",
            id="options of the script around those of the loss",
        ),
        pytest.param(
            "--loss tiny --tiny-weight 1 -- --rankclip-top_k 3",
            ("tiny", {"weight": 1.0}),
            "-- --rankclip-top_k 3",
            id="options of another loss behind --",
        ),
    ],
)
def test_what_is_the_scripts_reaches_it_in_order(typed: str, chosen: Any, rest: str) -> None:
    """Chosen are a loss and the options that were given to it, or None."""
    choice, others = parse(typed.split())
    assert others == rest.split()
    assert (None if choice is None else (choice.name, choice.losses[0].given)) == chosen


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "rankclap"], "--loss: .*rankclap'; did you mean rankclip"),
        (
            ["--loss", "rankclip", "--rankclip-model", "top_one", "--rankclip-top-k", "2"],
            "-model: model='top_one' needs top_k=None.* top_k=2",
        ),
        (
            ["--loss", "rankclip", "--rankclip-lamda-in", "3"],
            "--rankclip-lamda-in: there is no such option; did you mean --rankclip-lambda-in",
        ),
        (["--loss", "clip", "--rankclip-sched=linear"], "--rankclip-sched: there is no such"),
        (["--loss", "tiny-caption"], "--loss: tiny-caption needs a column"),
        (["--loss", "rankclip", "--loss-teacher", "missing"], "--loss-teacher: missing is no folder"),
        (["--loss", "mimicry", "--mimicry-teacher=x"], "--mimicry-teacher: .*it is .*--loss-teacher"),
        (["--loss-agreement-every", "2"], "--loss-agreement-every: only with --loss NAME"),
        (["--loss", "rankclip", "--loss_teacher", "y"], "--loss_teacher: .*; did you mean --loss-teacher"),
        (["--loss", "rankclip", "--loss-teecher", "y"], "--loss-teecher: .*; did you mean --loss-teacher"),
    ],
)
def test_wrong_options_are_refused_before_the_script_runs(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert re.search(message, capsys.readouterr().err)


def test_without_a_script_the_runner_shows_its_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["runner"])
    main()
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--rankclip-lambda-in X", "--loss-teacher TEXT", "--loss-schedule-unit {auto,epoch,step}"):
        assert option in text
    assert "rankclip-in: 0.0" in text


def test_a_loss_without_a_script_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["runner", "--loss", "rankclip"])
    with pytest.raises(SystemExit):
        main()
    assert "the script comes first, got --loss" in capsys.readouterr().err
