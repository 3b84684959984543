"""``python -m rankloss_trainers.transformers SCRIPT``: a script that knows nothing of rankloss."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

from rankloss import schedules
from rankloss_trainers.transformers.__main__ import parse

SCRIPT = Path(__file__).parent / "contrastive_script.py"
RUNNER = ("-m", "rankloss_trainers.transformers")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1", "--quiet")
TERMS = {"contrastive_loss", "cross_modal_loss", "in_modal_loss", "rank_lambda"}


def run(
    directory: Path, *argv: str, launcher: tuple[str, ...] = RUNNER, **changes: object
) -> subprocess.CompletedProcess[str]:
    given = {
        **{"output_dir": directory, "do_train": True, "do_eval": True, "use_cpu": True, "report_to": "none"},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "seed": 1},
        **{"save_strategy": "no", "remove_unused_columns": False, "dataloader_pin_memory": False},
        **changes,
    }
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *options, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def trained(directory: Path, *argv: str, **given: Any) -> Path:
    done = run(directory, *argv, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def history(directory: Path) -> list[dict[str, float]]:
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [line for line in log if "loss" in line]


def test_script_trains_with_the_loss_and_evaluates_without(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", launcher=())
    ranked = trained(tmp_path / "ranked", "--loss", "rankclip", "--rankclip-lambda-in", "0.5")
    lines = history(ranked)
    assert len(lines) == 8
    assert all(line.keys() >= TERMS for line in lines)
    assert lines[0]["contrastive_loss"] == pytest.approx(history(plain)[0]["loss"], rel=1e-4)
    assert [line["rank_lambda"] for line in lines] == pytest.approx(
        [schedules.rankclip(i, 8) for i in range(1, 9)]
    )
    last = lines[-1]
    assert last["in_modal_loss"] == pytest.approx(last["in_modal_raw"] * last["rank_lambda"] / 32, rel=1e-4)
    assert (ranked / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()
    assert "eval_loss" in json.loads((ranked / "eval_results.json").read_text())


def test_without_loss_the_script_is_bit_equal_to_itself(tmp_path: Path) -> None:
    plain, through, clip = (
        trained(tmp_path / name, *argv, launcher=launcher, do_eval=False)
        for name, argv, launcher in (
            ("plain", (), ()),
            ("through", (), RUNNER),
            ("clip", ("--loss", "clip"), RUNNER),
        )
    )
    weights = (plain / "model.safetensors").read_bytes()
    assert (through / "model.safetensors").read_bytes() == weights
    assert (clip / "model.safetensors").read_bytes() == weights
    assert "contrastive_loss" not in history(through)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        ("--loss", "rankclip"),
        # The script's columns of a teacher's features, of the texts alone.
        ("--loss", "rankclip-distill", "--rankclip-lambda-cross", "0", "--more_columns", "True"),
    ],
)
def test_two_processes_contrast_the_whole_batch(tmp_path: Path, loss: tuple[str, ...]) -> None:
    given = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "do_eval": False}
    loss = (*loss, "--rankclip-schedule", "constant")
    whole = history(trained(tmp_path / "1", *loss, per_device_train_batch_size=16, **given))
    two = history(trained(tmp_path / "2", *loss, launcher=(*TORCHRUN, *RUNNER), **given))
    assert len(whole) == len(two) == 4
    for a, b in zip(two, whole, strict=True):
        names = TERMS | {"loss"}
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path: Path) -> None:
    lines = history(trained(tmp_path, "--loss", "cyclip", launcher=(*LAUNCH, *RUNNER)))
    assert all("cyclic_cross_modal_loss" in line for line in lines)


def test_derived_trainer_is_reached(tmp_path: Path) -> None:
    directory = trained(tmp_path, "--loss", "rankclip", "--trainer", "Derived", max_steps=1)
    assert history(directory)[0].keys() >= TERMS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--trainer", "none"), "--loss rankclip was not used: .* has built no transformers.Trainer"),
        (("--trainer", "loop"), "RuntimeError: --loss rankclip was not used: "),
        (("--trainer", "OwnLoss"), "OwnLoss computes its own loss, which --loss rankclip would not reach"),
        (("--kind", "other"), "Classifier has neither a logit_scale nor a temperature"),
    ],
)
def test_script_that_would_train_something_else_fails(
    tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    done = run(tmp_path, "--loss", "rankclip", *argv)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if re.search(message, line)], done.stderr


def test_other_arguments_reach_the_script_in_order() -> None:
    argv = ["--a", "-1", "--loss", "rankclip", "x", "--rankclip-top-k=3", "--b=--loss", "--lo", "y"]
    name, options, rest = parse(argv)
    assert (name, options) == ("rankclip", {"top_k": 3})
    assert rest == ["--a", "-1", "x", "--b=--loss", "--lo", "y"]


def test_options_like_those_of_a_loss_are_the_scripts_without_one_and_after_two_dashes() -> None:
    argv = ["--streamed-data", "x", "--rankclip_top_k", "3"]
    assert parse(argv) == (None, {}, argv)
    behind = ["--loss", "cyclip", "--cyclip-lambda-in", "1", "--", "--rankclip-top_k", "3"]
    assert parse(behind) == ("cyclip", {"lambda_in": 1.0}, ["--", "--rankclip-top_k", "3"])


def test_arguments_without_a_loss_are_untouched() -> None:
    argv = ["--a", "--", "--los", "-x"]
    assert parse(argv) == (None, {}, argv)
    assert parse([*argv, "--loss", "clip"])[:2] == (None, {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "rankclap"], "--loss: must be one of clip, rankclip, .*, got 'rankclap'"),
        (["--rankclip-top-k", "3"], "--rankclip-top-k: only with --loss rankclip or"),
        (["--loss", "cyclip", "--rankclip-top-k", "3"], "--rankclip-top-k: only with --loss rankclip or"),
        (["--loss", "rankclip", "--rankclip-top-k", "0"], "--rankclip-top-k: must be a whole number"),
        (
            ["--loss", "rankclip", "--rankclip-diagonal", "exclude", "--rankclip-ties", "random"],
            "--rankclip-diagonal: diagonal=False makes lists",
        ),
        (["--loss", "alip"], "--alip-caption-key"),
        (["--loss"], "--loss: expected one argument"),
        *(
            (["--loss", loss, typed, "3"], f"{typed.partition('=')[0]}: there is no such option{meant}\n")
            for loss in ("rankclip", "cyclip", "clip")
            for typed, meant in (
                ("--rankclip-lamda-in", r", did you mean --rankclip-lambda-in\?"),
                ("--rankclip-lambda_in", r", did you mean --rankclip-lambda-in\?"),
                ("--rankclip_lambda_in", r", did you mean --rankclip-lambda-in\?"),
                ("--rankclip-sched=linear", r", did you mean --rankclip-schedule\?"),
                ("--alip-zzzzzzzzzzzzzzzzz", ""),
            )
        ),
    ],
)
def test_wrong_options_are_refused_before_the_script_runs(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert re.search(message, capsys.readouterr().err)


def test_help_is_the_runners_before_the_script() -> None:
    done = subprocess.run([sys.executable, *RUNNER, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "--rankclip-lambda-in" in text
    assert "a run of one epoch has no ramp over epochs and goes by steps (default: step)" in text
    assert "count only the best ranks of each list (default: all)" in text
    done = subprocess.run([sys.executable, *RUNNER, "--loss", "rankclip"], capture_output=True, text=True)
    assert done.returncode == 2
