"""The scripts of ``examples``: their commands as the shell expands them, and as the trainer runs them."""

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
from trainer_runs import Run, Trainer

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
    """The words of the command that a script executes, by its name, arguments and variables.

    Programs of the same names stand first on the path, and print their words, a NUL after each, in place of
    launching anything.
    """
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
    for name in ("DATA", "PAIRS", "MASTER_PORT"):  # which the scripts read
        environment.pop(name, None)

    def words_of(name: str, *arguments: str, **variables: str) -> list[str]:
        script = ["bash", str(RECIPES / f"{name}.sh"), *arguments]
        printed = subprocess.check_output(script, env={**environment, **variables}, text=True)
        return printed.split("\0")[:-1]

    return words_of


def trainer_arguments(words: list[str]) -> list[str]:
    """The arguments of open_clip's trainer in a command."""
    return words[words.index("open_clip_train.main") + 1 :]


README = (RECIPES / "README.md").read_text(encoding="utf-8")

each_recipe = pytest.mark.parametrize("name", NAMES)


def parsed_recipe(command: Command, name: str, launch: str = "8") -> argparse.Namespace:
    """The arguments of a recipe as the trainer parses them, launched as PROCESSES says."""
    return parse_args(trainer_arguments(command(name, launch)))


def whole_batch(args: argparse.Namespace, launch: str) -> int:
    """The pairs of an optimizer step, over all processes."""
    pairs: int = args.batch_size * args.accum_freq * PROCESSES[launch]
    return pairs


@each_recipe
def test_a_recipe_asks_for_a_known_model_and_for_its_loss_under_its_name(command: Command, name: str) -> None:
    args = parsed_recipe(command, name)
    assert args.loss == ("rankclip-distill" if name.endswith("-distill") else "rankclip")
    assert args.rankclip_schedule == "rankclip"
    assert args.model in open_clip.list_models()
    assert args.name == name


@each_recipe
def test_the_recipes_of_distillation_alone_have_a_teacher(command: Command, name: str) -> None:
    args = parsed_recipe(command, name)
    if name.endswith("-distill"):
        assert args.distill_pretrained in open_clip.list_pretrained_tags_by_model(args.distill_model)
    else:
        assert (args.distill_model, args.distill_pretrained) == (None, None)


each_launch = pytest.mark.parametrize("launch", PROCESSES)


@each_launch
@each_recipe
def test_batch_epochs_and_data_are_those_of_the_readme_on_any_number_of_processes(
    command: Command, name: str, launch: str
) -> None:
    args = parsed_recipe(command, name, launch)
    (row,) = re.findall(rf"\| \[`{name}\.sh`\].*", README)
    description, pairs, epochs = (cell.strip() for cell in row.split("|")[2:-1])
    assert whole_batch(args, launch) == int(pairs.replace(",", ""))
    assert args.epochs == int(epochs)
    assert ("YFCC15M" in description) == ("yfcc15m" in args.train_data)


@each_launch
@each_recipe
def test_a_recipe_on_several_processes_has_a_local_loss_with_gradients_of_the_gathered(
    command: Command, name: str, launch: str
) -> None:
    args = parsed_recipe(command, name, launch)
    has_several = PROCESSES[launch] > 1
    assert (args.local_loss, args.gather_with_grad) == (has_several, has_several)


@each_launch
def test_the_recipe_of_yfcc15m_warms_up_for_a_tenth_of_its_steps(command: Command, launch: str) -> None:
    args = parsed_recipe(command, "yfcc15m-vit-b-32", launch)
    steps_of_an_epoch = args.train_num_samples // whole_batch(args, launch)
    assert args.warmup == steps_of_an_epoch * args.epochs // 10


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cc3m")])
def test_the_recipes_of_the_paper_have_its_settings(command: Command, name: str) -> None:
    args = parsed_recipe(command, name)
    assert (args.lr, args.wd, args.warmup, args.epochs) == (5e-4, 0.1, 10000, 64)
    assert (args.beta1, args.beta2, args.eps, args.lr_scheduler) == (0.9, 0.999, 1e-8, "cosine")
    # The centre of each picture, uncropped: nothing is drawn.
    assert args.aug_cfg == {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    assert (args.csv_img_key, args.csv_caption_key, args.csv_separator) == ("image", "caption", ",")


@each_launch
@each_recipe
def test_the_readme_explains_every_option_of_a_recipe(command: Command, name: str, launch: str) -> None:
    options = [word for word in trainer_arguments(command(name, launch)) if word.startswith("--")]
    assert "--loss" in options
    for option in options:
        assert re.search(rf"`{option}\b", README), option


def commands_of(words: list[str], program: str) -> list[list[str]]:
    """The words of each command, where a script starts a program several times."""
    starts = [place for place, word in enumerate(words) if word == program]
    return [words[start:end] for start, end in itertools.pairwise([*starts, len(words)])]


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
    """The trainer's arguments of the table's trainings by their names, of ``table.sh train 8 --precision …``.

    CLIP's training with seed 0 is done already.
    """
    monkeypatch.chdir(tmp_path)
    last_checkpoint = tmp_path / "logs/cc3m-rn50-clip-0/checkpoints/epoch_64.pt"
    last_checkpoint.parent.mkdir(parents=True)
    last_checkpoint.touch()
    words = command("table", "train", "8", "--precision", "amp_bf16", DATA=str(shards))
    parsed = [parse_args(trainer_arguments(training)) for training in commands_of(words, "torchrun")]
    return {args.name: args for args in parsed}


def test_the_table_trains_clip_and_rankclip_with_three_seeds_but_not_again(trainings: Trainings) -> None:
    assert {name: args.seed for name, args in trainings.items()} == {
        # cc3m-rn50-clip-0 has its last checkpoint
        "cc3m-rn50-rankclip-0": 0,
        "cc3m-rn50-clip-1": 1,
        "cc3m-rn50-rankclip-1": 1,
        "cc3m-rn50-clip-2": 2,
        "cc3m-rn50-rankclip-2": 2,
    }


def test_the_table_trains_on_all_pairs_of_the_shards(trainings: Trainings, shards: Path) -> None:
    for args in trainings.values():
        assert args.train_data == f"{shards}/{{00000..00001}}.tar"
        assert (args.dataset_type, args.train_num_samples) == ("webdataset", PAIRS)


def test_a_training_of_the_table_goes_on_and_takes_options_of_the_trainer(trainings: Trainings) -> None:
    for args in trainings.values():
        assert (args.resume, args.precision) == ("latest", "amp_bf16")


def test_the_table_changes_no_other_argument_of_the_recipe(command: Command, trainings: Trainings) -> None:
    of_recipe = vars(parsed_recipe(command, "cc3m-rn50"))
    changed = {"seed", "name", "train_data", "dataset_type", "train_num_samples", "resume", "precision"}
    for seed in (1, 2):  # 0 is the recipe's own
        of_training = vars(trainings[f"cc3m-rn50-rankclip-{seed}"])
        assert of_training.keys() == of_recipe.keys()
        assert {key for key, value in of_recipe.items() if of_training[key] != value} == changed


def test_the_clip_of_the_table_is_trained_without_an_option_of_rankloss(trainings: Trainings) -> None:
    for seed in (1, 2):  # 0 is done already
        assert not {"loss", "loss_agreement_every"} & vars(trainings[f"cc3m-rn50-clip-{seed}"]).keys()
        assert "loss" in vars(trainings[f"cc3m-rn50-rankclip-{seed}"])


def test_the_table_evaluates_the_last_checkpoint_of_both_losses(command: Command, shards: Path) -> None:
    words = command("table", "evaluate", DATA=str(shards), SEEDS="7", EPOCHS="1")
    of_clip, of_rankclip = commands_of(words, "clip_benchmark")
    for evaluation, name in ((of_clip, "clip-7"), (of_rankclip, "rankclip-7")):
        value_of = dict(itertools.pairwise(evaluation))  # by the option before it
        assert value_of["--pretrained"] == f"logs/cc3m-rn50-{name}/checkpoints/epoch_1.pt"
        assert value_of["--output"] == f"results/cc3m-rn50-{name}-{{dataset}}.json"
        assert value_of["--dataset_root"] == "tests/wds_{dataset_cleaned}"


def test_a_training_of_the_table_gives_a_checkpoint_to_evaluate(
    command: Command, trainer: Trainer, shards: Path
) -> None:
    tiny_model = f"local-dir:{trainer.directory / 'tiny'}"
    options = [
        *("--model", tiny_model, "--device", "cpu", "--workers", "0"),
        *("--batch-size", str(PAIRS // 2), "--logs", str(trainer.directory / "logs")),
    ]
    words = command("table", "train", "1", *options, DATA=str(shards), SEEDS="7", EPOCHS="1")
    _of_clip, of_rankclip = commands_of(words, "python")
    run = trainer.call("cc3m-rn50-rankclip-7", *trainer_arguments(of_rankclip), alone=True)
    assert run.scalars["rank_lambda"][0] > 0
    model = open_clip.create_model(tiny_model, load_weights=False)
    # As clip_benchmark does with --pretrained; it raises for weights of another model.
    open_clip.load_checkpoint(model, str(run.directory / "checkpoints/epoch_1.pt"))


TOP_1 = {"clip": (0.20, 0.22, 0.21), "rankclip": (0.23, 0.23, 0.22)}  # by seed
RECALL_AT_5 = {"clip": (0.50, 0.50, 0.50), "rankclip": (0.50, 0.51, 0.52)}


def write_result(folder: Path, loss: str, seed: int, data: str, metrics: dict[str, float]) -> None:
    """Write a file as clip_benchmark does, for the last checkpoint of a training of the table."""
    pretrained = f"logs/cc3m-rn50-{loss}-{seed}/checkpoints/epoch_64.pt"
    result = {"dataset": f"wds/{data}", "pretrained": pretrained, "metrics": metrics}
    (folder / f"{loss}-{seed}-{data}.json").write_text(json.dumps(result))


def test_the_table_has_paired_differences_of_the_seeds(tmp_path: Path) -> None:
    """In points of a hundred, with half the width of SciPy's 95 % interval of a paired t-test."""
    for loss in ("clip", "rankclip"):
        for seed in range(3):
            top_1, recall = TOP_1[loss][seed], RECALL_AT_5[loss][seed]
            write_result(
                tmp_path, loss, seed, "imagenet1k", {"acc1": top_1, "acc5": 0.5, "mean_per_class": 1}
            )
            write_result(tmp_path, loss, seed, "flickr30k", {"image_retrieval_recall@5": recall})
    _header, _rule, of_recall, of_top_1, _of_top_5 = runpy.run_path(str(RECIPES / "table.py"))["table"](
        tmp_path
    )
    paired = stats.ttest_rel(np.multiply(TOP_1["rankclip"], 100), np.multiply(TOP_1["clip"], 100))
    low, high = paired.confidence_interval(0.95)
    assert of_top_1 == f"| imagenet1k | top-1 | 21.00 | 22.67 | +1.67 ± {(high - low) / 2:.2f} | 3 |"
    assert of_recall.startswith("| flickr30k | text → picture R@5 | 50.00 | 51.00 | +1.00 ± ")


def trained_example(command: Command, trainer: Trainer, sample_folder: Path, name: str) -> Run:
    """A run of a short example's command on rankloss's sample, for one epoch."""
    words = command(f"../trainers/{name}", FOLDER=str(sample_folder))
    options = ["--logs", str(trainer.directory / "logs"), "--name", name, "--epochs", "1"]
    return trainer.call(name, *trainer_arguments(words), *options, alone=True)


def check_example(run: Run, logged: set[str]) -> None:
    """Check that a run logged these values, evaluated the held-out pairs and saved its epoch."""
    assert logged <= run.train_lines()[-1].keys()
    assert "image_to_text_R@1: " in run.log
    assert run.tensors_after_epoch(1)


def test_the_example_of_open_clip_trains(command: Command, trainer: Trainer, sample_folder: Path) -> None:
    run = trained_example(command, trainer, sample_folder, "open_clip")
    check_example(run, {"Contrastive_loss", "Cross_modal_loss", "In_modal_loss", "Rank_lambda"})


@pytest.mark.slow
def test_the_example_of_repeated_captions_trains_on_pairs_with_partners(
    command: Command, trainer: Trainer, sample_folder: Path
) -> None:
    run = trained_example(command, trainer, sample_folder, "repeated_captions")
    check_example(run, {"Contrastive_loss", "Pairs_with_partner"})
    assert run.train_lines()[-1]["Pairs_with_partner"] > 0.5, "most captions of a batch are there twice"
