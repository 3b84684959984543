"""The scripts of ``examples``: what the shell makes of their commands, what the trainer parses and runs."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import runpy
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
from open_clip_train.params import parse_args
from scipy import stats
from trainer_runs import Trainer

from samples import add_sample

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples/recipes"
NAMES = sorted(script.stem for script in RECIPES.glob("*-*.sh"))
PROCESSES = {"1": 1, "8": 8, "slurm": 8}  # started by each way to launch
PAIRS = 16  # of the tiny data
Command = Callable[..., list[str]]
Trainings = dict[str, argparse.Namespace]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command that a script executes, from shims that print it in place of launching."""
    shims = tmp_path_factory.mktemp("shims")
    for name, reply in (
        ("python", """printf '%s\\0' python "$@" """),
        ("torchrun", """printf '%s\\0' torchrun "$@" """),
        ("srun", """printf '%s\\0' srun "$MASTER_ADDR:$MASTER_PORT" "$@" """),
        ("scontrol", "echo first-node; echo second-node"),
        ("clip_benchmark", """printf '%s\\0' clip_benchmark "$@" """),
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


README = (RECIPES / "README.md").read_text(encoding="utf-8")

each_recipe = pytest.mark.parametrize("name", NAMES)


def recipe(command: Command, name: str, launch: str = "8") -> argparse.Namespace:
    """The trainer's arguments of a recipe."""
    return parse_args(trainer_arguments(command(name, launch)))


@each_recipe
def test_a_recipe_trains_a_known_model_with_its_loss_under_its_name(command: Command, name: str) -> None:
    args = recipe(command, name)
    assert args.loss == ("rankclip-distill" if name.endswith("-distill") else "rankclip")
    assert args.rankclip_schedule == "rankclip"
    assert args.model in open_clip.list_models()
    assert args.name == name


@each_recipe
def test_the_recipes_of_distillation_alone_have_a_teacher(command: Command, name: str) -> None:
    args = recipe(command, name)
    if name.endswith("-distill"):
        assert args.distill_pretrained in open_clip.list_pretrained_tags_by_model(args.distill_model)
    else:
        assert (args.distill_model, args.distill_pretrained) == (None, None)


@pytest.mark.parametrize("launch", PROCESSES)
@each_recipe
def test_batch_epochs_and_data_are_those_of_the_readme_on_any_number_of_processes(
    command: Command, name: str, launch: str
) -> None:
    args = recipe(command, name, launch)
    assert args.local_loss is args.gather_with_grad is (PROCESSES[launch] > 1)
    batch = args.batch_size * args.accum_freq * PROCESSES[launch]
    (row,) = re.findall(rf"\| \[`{name}\.sh`\].*", README)
    description, pairs, epochs = (cell.strip() for cell in row.split("|")[2:-1])
    assert (batch, args.epochs) == (int(pairs.replace(",", "")), int(epochs))
    assert ("YFCC15M" in description) == ("yfcc15m" in args.train_data)
    if not name.startswith("cc3m"):
        assert args.warmup == args.train_num_samples // batch * args.epochs // 10


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cc3m")])
def test_the_recipes_of_the_paper_have_its_settings(command: Command, name: str) -> None:
    args = recipe(command, name)
    assert (args.lr, args.wd, args.warmup, args.epochs) == (5e-4, 0.1, 10000, 64)
    assert (args.beta1, args.beta2, args.eps, args.lr_scheduler) == (0.9, 0.999, 1e-8, "cosine")
    # The centre of each picture, uncropped: nothing is drawn.
    assert args.aug_cfg == {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    assert (args.csv_img_key, args.csv_caption_key, args.csv_separator) == ("image", "caption", ",")


@pytest.mark.parametrize("launch", PROCESSES)
@each_recipe
def test_the_readme_explains_every_option_of_a_recipe(command: Command, name: str, launch: str) -> None:
    for word in trainer_arguments(command(name, launch)):
        assert not word.startswith("--") or re.search(rf"`{word}\b", README), word


def commands_of(words: list[str], program: str) -> list[list[str]]:
    """The commands of a program that a script starts one after another."""
    starts = [n for n, word in enumerate(words) if word == program]
    return [words[a:b] for a, b in itertools.pairwise([*starts, len(words)])]


@pytest.fixture
def shards(trainer: Trainer, tmp_path: Path) -> Path:
    """Two shards as img2dataset writes them: pictures, captions, and the counts beside the shards."""
    folder = tmp_path / "cc3m"
    folder.mkdir()
    for shard, rows in enumerate((trainer.rows[: PAIRS // 2], trainer.rows[PAIRS // 2 : PAIRS])):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number, (image, caption, _) in enumerate(rows):
                members = {"png": Path(image).read_bytes(), "txt": caption.encode(), "json": b"{}"}
                add_sample(tar, f"{shard:05}{number:04}", **members)
        counts = json.dumps({"count": 10, "successes": len(rows), "status_dict": {"success": 8}}, indent=4)
        (folder / f"{shard:05}_stats.json").write_text(counts)
    return folder


@pytest.fixture
def trainings(command: Command, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    """The trainer's arguments of the table's trainings by their names; the first of all is done already."""
    monkeypatch.chdir(tmp_path)
    done = tmp_path / "logs/cc3m-rn50-clip-0/checkpoints/epoch_64.pt"
    done.parent.mkdir(parents=True)
    done.touch()
    words = command("table", "train", "8", "--precision", "amp_bf16", DATA=str(shards))
    parsed = [parse_args(trainer_arguments(one)) for one in commands_of(words, "torchrun")]
    return {args.name: args for args in parsed}


def test_the_table_trains_clip_and_rankclip_with_three_seeds_but_not_again(trainings: Trainings) -> None:
    names = [f"cc3m-rn50-{loss}-{seed}" for seed in range(3) for loss in ("clip", "rankclip")]
    assert [*trainings] == names[1:]
    assert [args.seed for args in trainings.values()] == [int(name[-1]) for name in names[1:]]


def test_the_table_trains_on_all_pairs_of_the_shards(trainings: Trainings, shards: Path) -> None:
    for args in trainings.values():
        assert args.train_data == f"{shards}/{{00000..00001}}.tar"
        assert (args.dataset_type, args.train_num_samples) == ("webdataset", PAIRS)


def test_a_training_of_the_table_goes_on_and_takes_options_of_the_trainer(trainings: Trainings) -> None:
    for args in trainings.values():
        assert (args.resume, args.precision) == ("latest", "amp_bf16")


def test_the_table_changes_no_other_argument_of_the_recipe(command: Command, trainings: Trainings) -> None:
    of_recipe = vars(recipe(command, "cc3m-rn50"))
    changed = {"seed", "name", "train_data", "dataset_type", "train_num_samples", "resume", "precision"}
    for name, args in trainings.items():
        differ = {key for key, value in of_recipe.items() if vars(args).get(key) != value}
        if "rankclip" in name:
            assert differ - {"seed"} == changed - {"seed"}  # a seed is the recipe's own
        else:
            assert not {"loss", "loss_agreement_every"} & vars(args).keys()


def test_the_table_evaluates_the_last_checkpoint_of_both_losses(command: Command, shards: Path) -> None:
    words = command("table", "evaluate", DATA=str(shards), SEEDS="7", EPOCHS="1")
    for evaluated, name in zip(commands_of(words, "clip_benchmark"), ("clip-7", "rankclip-7"), strict=True):
        given = dict(itertools.pairwise(evaluated))
        assert given["--pretrained"] == f"logs/cc3m-rn50-{name}/checkpoints/epoch_1.pt"
        assert given["--output"] == f"results/cc3m-rn50-{name}-{{dataset}}.json"
        assert given["--dataset_root"] == "tests/wds_{dataset_cleaned}"


def test_a_training_of_the_table_gives_a_checkpoint_to_evaluate(
    command: Command, trainer: Trainer, shards: Path
) -> None:
    options = {
        **{"--model": f"local-dir:{trainer.directory / 'tiny'}", "--device": "cpu", "--workers": "0"},
        **{"--batch-size": str(PAIRS // 2), "--logs": str(trainer.directory / "logs")},
    }
    given = {"DATA": str(shards), "SEEDS": "7", "EPOCHS": "1"}
    plain, ranked = commands_of(
        command("table", "train", "1", *itertools.chain(*options.items()), **given), "python"
    )
    assert "--loss" not in plain
    run = trainer.call("cc3m-rn50-rankclip-7", *trainer_arguments(ranked), alone=True)
    assert run.scalars["rank_lambda"][0] > 0
    model = open_clip.create_model(options["--model"], load_weights=False)
    open_clip.load_checkpoint(model, str(run.directory / "checkpoints/epoch_1.pt"))  # as --pretrained


def test_the_table_has_paired_differences_of_the_seeds(tmp_path: Path) -> None:
    scores = {"clip": (0.20, 0.22, 0.21), "rankclip": (0.23, 0.23, 0.22)}
    for loss, of in scores.items():
        for seed, score in enumerate(of):
            recall = {"image_retrieval_recall@5": 0.5 + 0.01 * seed * (loss == "rankclip")}
            found = {"imagenet1k": {"acc1": score, "acc5": 0.5, "mean_per_class": 1}, "flickr30k": recall}
            pretrained = f"logs/cc3m-rn50-{loss}-{seed}/checkpoints/epoch_64.pt"
            for data, metrics in found.items():
                result = {"dataset": f"wds/{data}", "pretrained": pretrained, "metrics": metrics}
                (tmp_path / f"{loss}-{seed}-{data}.json").write_text(json.dumps(result))
    _, _, recall, first, _ = runpy.run_path(str(RECIPES / "table.py"))["table"](tmp_path)
    test = stats.ttest_rel(np.multiply(scores["rankclip"], 100), np.multiply(scores["clip"], 100))
    low, high = test.confidence_interval()
    assert first == f"| imagenet1k | top-1 | 21.00 | 22.67 | +1.67 ± {(high - low) / 2:.2f} | 3 |"
    assert recall.startswith("| flickr30k | text → picture R@5 | 50.00 | 51.00 | +1.00 ± ")


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("open_clip", {"Contrastive_loss", "Cross_modal_loss", "In_modal_loss", "Rank_lambda"}),
        pytest.param("repeated_captions", {"Contrastive_loss", "Pairs_with_partner"}, marks=pytest.mark.slow),
    ],
)
def test_short_example_trains(
    command: Command, trainer: Trainer, sample_folder: Path, name: str, terms: set[str]
) -> None:
    words = command(f"../trainers/{name}", FOLDER=str(sample_folder))
    here = {"--logs": str(trainer.directory / "logs"), "--name": name, "--epochs": "1"}
    options = itertools.chain(*here.items())
    run = trainer.call(name, *trainer_arguments(words), *options, alone=True)
    assert terms <= run.train_lines()[-1].keys()
    assert "image_to_text_R@1: " in run.log  # of the held-out pairs
    assert run.epoch(1)
    assert name == "open_clip" or run.train_lines()[-1]["Pairs_with_partner"] > 0.5
