"""The patch by which open_clip's main branch trains losses of other packages, without a plug-in."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import LOCAL_LOSS_WITH_GRAD, PLUGIN_OFF, STEPS, Run, Trainer, assert_equal_training

from open_clip_main import unpacked
from rankloss import schedules

UPSTREAM = Path(__file__).parents[2] / "tools" / "upstream"
# One process imports the trainer, and each run is a fork of it.
ALL_RUNS = """
import json, multiprocessing, sys
from open_clip_train.main import main

def run(argv, output):
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    main(argv)

codes = {}
for name, (argv, output) in json.loads(sys.argv[1]).items():
    process = multiprocessing.get_context("fork").Process(target=run, args=(argv, output))
    process.start()
    process.join()
    codes[name] = process.exitcode
print(json.dumps([codes, [name for name in sys.modules if name.startswith("rankloss")]]))
"""


def rankloss_flags(name: str, **options: Any) -> list[str]:
    """The patched trainer's flags of a loss of rankloss; "base" is CLIP's or SigLIP's alone."""
    words = [f"name={name}", *(f"{key}={value}" for key, value in options.items())]
    return ["--loss", "rankloss_losses:create", "--loss-kwargs", *words]


RUNS: dict[str, list[str]] = {
    "stock": [],
    "base": rankloss_flags("base"),
    "rankclip": [*rankloss_flags("rankclip", schedule="linear"), "--accum-freq", "2"],
    "spread": [*rankloss_flags("spread", weight=0.5), *LOCAL_LOSS_WITH_GRAD],
    "siglip": [*rankloss_flags("rankclip+spread"), "--siglip"],
    "stock siglip": ["--siglip"],
}
# Runs that the trainer refuses: their options, and the message.
REFUSED = {
    "no factory": (["--loss", "rankclip"], "--loss must be MODULE:FACTORY, got 'rankclip'"),
    "parameters": (["--loss", "own_loss:create"], "--loss own_loss:create has parameters"),
    "generative": (
        [*rankloss_flags("rankclip"), "--model", "naflexgenlip_b16"],
        "--loss needs a contrastive model",
    ),
}


@pytest.fixture(scope="module")
def patched_runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs, of one epoch, by open_clip's main branch with the patch and without our plug-in."""
    directory = tmp_path_factory.mktemp("patched")
    python_path = os.pathsep.join([str(directory), str(UPSTREAM), unpacked(directory)])
    patch = ["git", "apply", "--verbose", str(UPSTREAM / "open_clip-loss.patch")]
    subprocess.run(patch, cwd=directory / "open_clip", check=True)
    # A loss with a weight, which the trainer's optimizer would not train.
    (directory / "own_loss.py").write_text("import torch\ndef create(args): return torch.nn.Linear(1, 1)\n")

    options = {**RUNS, **{name: of_refused for name, (of_refused, _message) in REFUSED.items()}}
    outputs = {name: directory / f"{name}.txt" for name in options}
    commands = {}
    for name, of_run in options.items():
        argv = trainer.arguments(f"upstream {name}", "--epochs", "1", *of_run)
        commands[name] = (argv, str(outputs[name]))
    done = trainer.python("-c", ALL_RUNS, json.dumps(commands), PYTHONPATH=python_path, **PLUGIN_OFF)
    exit_codes, modules_of_rankloss = json.loads(done.output.splitlines()[-1])
    assert modules_of_rankloss == [], "no plug-in is in the process that imported the trainer"
    for name, exit_code in exit_codes.items():
        assert exit_code == (1 if name in REFUSED else 0), outputs[name].read_text()[-4000:]
    logs = trainer.directory / "logs"
    return {name: Run(output.read_text(), logs / f"upstream {name}") for name, output in outputs.items()}


def test_a_loss_that_equals_the_tasks_own_trains_to_the_bit(patched_runs: dict[str, Run]) -> None:
    assert_equal_training(patched_runs["stock"], patched_runs["base"], epochs=(1,))


ACCUMULATED_STEPS = STEPS // 2  # optimizer steps of an epoch with --accum-freq 2


def test_the_terms_are_summed(patched_runs: dict[str, Run]) -> None:
    scalars = patched_runs["rankclip"].scalars
    terms = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert [name for name in scalars if name.endswith("_loss")] == terms
    for step in range(ACCUMULATED_STEPS):
        total = sum(scalars[name][step] for name in terms)
        assert scalars["loss"][step] == pytest.approx(total, rel=1e-6)


def test_a_schedule_follows_the_optimizer_steps(patched_runs: dict[str, Run]) -> None:
    """The linear one: the rank terms have the weight 0 in the first step of a training, and more later."""
    cross_modal = patched_runs["rankclip"].scalars["cross_modal_loss"]
    is_trained = {step: value > 0 for step, value in cross_modal.items()}
    steps = range(ACCUMULATED_STEPS)
    assert is_trained == {step: schedules.linear(step + 1, len(steps)) > 0 for step in steps}


@pytest.mark.parametrize(("name", "stock_name"), [("spread", "stock"), ("siglip", "stock siglip")])
def test_an_added_term_trains_beside_the_tasks_own(
    patched_runs: dict[str, Run], name: str, stock_name: str
) -> None:
    """At the first step, of equal weights, the task's own term is the same; then the weights differ."""
    run, stock = patched_runs[name], patched_runs[stock_name]
    own_term = stock.scalars["contrastive_loss"][0]
    assert run.scalars["contrastive_loss"][0] == pytest.approx(own_term, rel=1e-6)
    assert run.scalars["spread_loss"][0] > 0
    assert not torch.equal(
        run.tensors_after_epoch(1)["visual.proj"], stock.tensors_after_epoch(1)["visual.proj"]
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_cannot_be_trained_ends_the_run_before_a_step(
    patched_runs: dict[str, Run], name: str
) -> None:
    output = patched_runs[name].output
    _options, message = REFUSED[name]
    assert message in output
    assert "Train Epoch" not in output
