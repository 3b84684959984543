"""The scripts of ``examples``: what the shell makes of their commands, what the trainer parses and runs."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
from open_clip_train.params import parse_args
from trainer_runs import Trainer

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples/recipes"
NAMES = sorted(script.stem for script in RECIPES.glob("*.sh"))
PROCESSES = {"1": 1, "8": 8, "slurm": 8}  # started by each way to launch
PAIRS = 16  # of the tiny data
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command that a script executes, from shims that print it in place of launching."""
    shims = tmp_path_factory.mktemp("shims")
    for name, reply in (
        ("python", """printf '%s\\0' python "$@" """),
        ("torchrun", """printf '%s\\0' torchrun "$@" """),
        ("srun", """printf '%s\\0' srun "$MASTER_ADDR:$MASTER_PORT" "$@" """),
        ("scontrol", "echo first-node; echo second-node"),
    ):
        (shims / name).write_text(f"#!/bin/sh\n{reply}\n")
        (shims / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "nodes", "SLURM_CPUS_PER_TASK": "9"}
    environment = {**os.environ, **slurm, "PATH": f"{shims}:{os.environ['PATH']}"}
    for name in ("DATA", "PAIRS", "MASTER_PORT"):
        environment.pop(name, None)

    def run(name: str, *arguments: str, **variables: str) -> list[str]:
        script = ["bash", str(RECIPES / f"{name}.sh"), *arguments]
        given = {**environment, **variables}
        return subprocess.check_output(script, env=given, text=True).split("\0")[:-1]

    return run


def trainer_arguments(words: list[str]) -> list[str]:
    return words[words.index("open_clip_train.main") + 1 :]


@pytest.mark.parametrize("launch", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_trainer_parses_the_command_and_the_readme_explains_it(
    command: Command, name: str, launch: str
) -> None:
    words = trainer_arguments(command(name, launch))
    args, readme = parse_args(words), (RECIPES / "README.md").read_text(encoding="utf-8")
    taught = name.endswith("-distill")
    assert args.loss == ("rankclip-distill" if taught else "rankclip")
    assert taught == ((args.distill_model, args.distill_pretrained) != (None, None))
    if taught:
        assert args.distill_pretrained in open_clip.list_pretrained_tags_by_model(args.distill_model)
    assert args.rankclip_schedule == "rankclip"
    assert args.model in open_clip.list_models()
    assert args.name == name
    assert args.local_loss is args.gather_with_grad is (PROCESSES[launch] > 1)
    batch = args.batch_size * args.accum_freq * PROCESSES[launch]
    (row,) = re.findall(rf"\| \[`{name}\.sh`\].*", readme)
    description, pairs, epochs = (cell.strip() for cell in row.split("|")[2:-1])
    assert (batch, args.epochs) == (int(pairs.replace(",", "")), int(epochs))
    if name.startswith("cc3m"):  # as published
        assert (args.lr, args.wd, args.warmup, args.epochs) == (5e-4, 0.1, 10000, 64)
        assert (args.beta1, args.beta2, args.eps, args.lr_scheduler) == (0.9, 0.999, 1e-8, "cosine")
        # The centre of each picture, uncropped: nothing is drawn.
        assert args.aug_cfg == {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        assert (args.csv_img_key, args.csv_caption_key, args.csv_separator) == ("image", "caption", ",")
    else:
        assert args.warmup == args.train_num_samples // batch * args.epochs // 10
    assert ("YFCC15M" in description) == ("yfcc15m" in args.train_data)
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"`{option}\b", readme), option


def test_command_trains_a_step(command: Command, trainer: Trainer) -> None:
    """On a tiny model and its data; nothing else is changed."""
    name, table = "cc3m-rn50-distill", trainer.directory / "recipes.csv"
    rows = [f'{image},"{caption}"' for image, caption, _ in trainer.rows[:PAIRS]]
    table.write_text("\n".join(["image,caption", *rows]) + "\n")
    accum_freq = parse_args(trainer_arguments(command(name, "1"))).accum_freq
    tiny = f"local-dir:{trainer.directory / 'tiny'}"
    options = {
        **{"--model": tiny, "--distill-model": tiny, "--distill-pretrained": "none", "--device": "cpu"},
        **{"--batch-size": str(PAIRS // accum_freq), "--epochs": "1", "--workers": "0"},
        **{"--logs": str(trainer.directory / "logs"), "--name": name},
    }
    words = command(name, "1", *itertools.chain(*options.items()), DATA=str(table), PAIRS=str(PAIRS))
    run = trainer.call(name, *trainer_arguments(words), alone=True)
    assert run.returncode == 0, run.output[-4000:]
    assert {"cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"} < run.scalars.keys()
    assert all(list(values) == [0] and np.isfinite(values[0]) for values in run.scalars.values())
    assert run.scalars["rank_lambda"][0] == 2.0  # the last step of one
    assert run.epoch(1)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("open_clip", {"Contrastive_loss", "Cross_modal_loss", "In_modal_loss", "Rank_lambda"}),
        ("repeated_captions", {"Contrastive_loss", "Pairs_with_partner"}),
    ],
)
def test_short_example_trains(command: Command, trainer: Trainer, name: str, terms: set[str]) -> None:
    pytest.importorskip("openmoji_demo")
    words = command(f"../trainers/{name}", FOLDER=str(trainer.directory / name))
    script, folder = words[1:3]
    runpy.run_path(str(ROOT / script))["write"](Path(folder))
    here = {"--model": f"local-dir:{ROOT / 'examples/demo/model'}", "--logs": str(trainer.directory / "logs")}
    options = itertools.chain(*{**here, "--name": name, "--epochs": "1"}.items())
    run = trainer.call(name, *trainer_arguments(words), *options, alone=True)
    assert run.returncode == 0, run.output[-4000:]
    assert terms <= run.train_lines()[-1].keys()
    assert name == "open_clip" or run.train_lines()[-1]["Pairs_with_partner"] > 0.5
