"""The patch by which open_clip's main branch trains losses of other packages, without a plug-in."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import BOTH, OFF, STEPS, Run, Trainer, assert_equal_training

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


def by(name: str, **options: Any) -> list[str]:
    words = [f"name={name}", *(f"{key}={value}" for key, value in options.items())]
    return ["--loss", "rankloss_losses:create", "--loss-kwargs", *words]


RUNS: dict[str, list[str]] = {
    "stock": [],
    "base": by("base"),
    "rankclip": [*by("rankclip", schedule="linear"), "--accum-freq", "2"],
    "spread": [*by("spread", weight=0.5), *BOTH],
    "siglip": [*by("rankclip+spread"), "--siglip"],
    "stock siglip": ["--siglip"],
}
REFUSED = {
    "no factory": (["--loss", "rankclip"], "--loss must be MODULE:FACTORY, got 'rankclip'"),
    "parameters": (["--loss", "own_loss:create"], "--loss own_loss:create has parameters"),
    "generative": ([*by("rankclip"), "--model", "naflexgenlip_b16"], "--loss needs a contrastive model"),
}


@pytest.fixture(scope="module")
def patched_runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("patched")
    path = unpacked(directory)
    patch = ["git", "apply", "--verbose", str(UPSTREAM / "open_clip-loss.patch")]
    subprocess.run(patch, cwd=directory / "open_clip", check=True)
    (directory / "own_loss.py").write_text("import torch\ndef create(args): return torch.nn.Linear(1, 1)\n")
    outputs = {name: str(directory / f"{name}.txt") for name in (*RUNS, *REFUSED)}
    commands = {name: trainer.arguments(f"upstream {name}", "--epochs", "1", *x) for name, x in RUNS.items()}
    commands |= {name: trainer.arguments(f"upstream {name}", *x) for name, (x, _) in REFUSED.items()}
    given = json.dumps({name: (argv, outputs[name]) for name, argv in commands.items()})
    path = os.pathsep.join([str(directory), str(UPSTREAM), path])
    done = trainer.python("-c", ALL_RUNS, given, PYTHONPATH=path, **OFF)
    codes, modules = json.loads(done.output.splitlines()[-1])
    assert modules == [], "no plug-in is in the process that imported the trainer"
    for name, code in codes.items():
        assert code == (name in REFUSED), Path(outputs[name]).read_text()[-4000:]
    logs = trainer.directory / "logs"
    return {name: Run(Path(x).read_text(), logs / f"upstream {name}") for name, x in outputs.items()}


def test_a_loss_that_equals_the_tasks_own_trains_to_the_bit(patched_runs: dict[str, Run]) -> None:
    assert_equal_training(patched_runs["stock"], patched_runs["base"], epochs=(1,))


def test_terms_are_summed_and_a_schedule_follows_the_optimizer_steps(patched_runs: dict[str, Run]) -> None:
    run, steps = patched_runs["rankclip"].scalars, STEPS // 2
    terms = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert [name for name in run if name.endswith("_loss")] == terms
    for step in range(steps):
        assert run["loss"][step] == pytest.approx(sum(run[name][step] for name in terms), rel=1e-6)
        is_ranked = schedules.linear(step + 1, steps) > 0
        assert (run["cross_modal_loss"][step] > 0) is is_ranked
    assert run["cross_modal_loss"].keys() == set(range(steps))


@pytest.mark.parametrize(("name", "stock"), [("spread", "stock"), ("siglip", "stock siglip")])
def test_an_added_term_trains_beside_the_tasks_own(
    patched_runs: dict[str, Run], name: str, stock: str
) -> None:
    run, own = patched_runs[name].scalars, patched_runs[stock].scalars
    assert run["contrastive_loss"][0] == pytest.approx(own["contrastive_loss"][0], rel=1e-6)
    assert run["spread_loss"][0] > 0
    weights, others = (patched_runs[x].epoch(1) for x in (name, stock))
    assert not torch.equal(weights["visual.proj"], others["visual.proj"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_cannot_be_trained_ends_the_run_before_a_step(
    patched_runs: dict[str, Run], name: str
) -> None:
    output = patched_runs[name].output
    assert REFUSED[name][1] in output
    assert "Train Epoch" not in output
