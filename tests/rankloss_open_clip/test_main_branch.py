"""open_clip's main branch: tasks, FSDP2, three ways to compile, and batches that change their size."""

from __future__ import annotations

import itertools
import math
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import FLAG, TinyEncoders, put_tiny_encoders, write_aligned
from trainer_runs import (
    LOCAL_LOSS_WITH_GRAD,
    RANKCLIP_OFFICIAL,
    SAMPLES,
    STEPS,
    NoRecompilation,
    Run,
    Trainer,
    assert_equal_training,
)

from open_clip_main import unpacked
from rankloss import schedules
from samples import add_sample

pytestmark = pytest.mark.slow

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"]
"""The entries that are logged, and not trained."""
EPOCHS = 3
STRATEGIES = ("task", "step", "model")
UNCROPPED = ["--aug-cfg", "scale=(1.0,1.0)", "--loss-agreement-every", "1"]  # for one step an epoch
PER_STEP = ["--loss", "rankclip", "--rankclip-schedule", "linear", "--loss-schedule-unit", "step"]
# A program that makes the runs of a file, in forks of one process that has imported the trainer, and writes
# their results into that file.
ALL_RUNS = """
import pickle, sys
trainer, runs = pickle.load(open(sys.argv[1], "rb"))
done = {}
for name, (options, keywords) in runs.items():
    done[name] = trainer.call(f"main {name}", *options, **keywords)
pickle.dump(done, open(sys.argv[1], "wb"))
"""


@pytest.fixture(scope="module")
def main_runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs of this file by their names, with the main branch in place of the installed open_clip."""
    python_path = unpacked(tmp_path_factory.mktemp("main"))
    return trained(trainer, python_path, runs_of(trainer))


def runs_of(trainer: Trainer) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The options of each run, and the keywords of ``Trainer.call``: processes, exit code, a change."""
    runs: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def add(name: str, *options: str, epochs: int = EPOCHS, **keywords: object) -> None:
        runs[name] = (["--epochs", str(epochs), *options], keywords)

    add("steps", *PER_STEP, epochs=1)
    add("single", *RANKCLIP_OFFICIAL)
    add("stock")
    add("whole batch", *RANKCLIP_OFFICIAL, *UNCROPPED, "--batch-size", "64")
    add(
        "fsdp",
        *RANKCLIP_OFFICIAL,
        "--fsdp",
        *LOCAL_LOSS_WITH_GRAD,
        *UNCROPPED,
        "--batch-size",
        "32",
        processes=2,
    )
    eager = ["--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy"]
    for strategy in STRATEGIES:
        add(strategy, *PER_STEP, *eager, strategy, epochs=1, change=NoRecompilation())
    model = ("--model", f"local-dir:{trainer.directory / 'tiny-naflex'}", "--use-naflex")
    sizes = ("--naflex-seq-lens", "4", "16", "--naflex-patch-sizes", "16")
    batches = ("--naflex-max-tokens-per-batch", "64", "--naflex-batch-divisor", "4")
    add("naflex", *PER_STEP, *model, *sizes, *batches, *trainer.webdataset, epochs=1)
    add("generative", *RANKCLIP_OFFICIAL, "--model", "naflexgenlip_b16", code=2)
    audio = ("--dataset-type", "synthetic-audio", "--model", "CLAP-HTSAT-tiny-Roberta-base")
    add("audio", *RANKCLIP_OFFICIAL, *audio, code=2)
    columns = ("--loss", "clip-ids+rankclip", "--clip-ids-key")
    halves, shard = (*LOCAL_LOSS_WITH_GRAD, *UNCROPPED, "--batch-size", "32"), blank_captions(trainer)
    add("csv", *columns, "group", *table_of_groups(trainer), *UNCROPPED, "--batch-size", "64")
    add("csv, accumulated", *columns, "group", *table_of_groups(trainer), *halves, "--accum-freq", "2")
    add("csv, fsdp", *columns, "group", *table_of_groups(trainer), *halves, "--fsdp", processes=2)
    add("blank", *columns, "group.txt", *shard, *UNCROPPED, "--batch-size", "64", epochs=1)
    mimicry = ("--loss", "mimicry", "--loss-teacher")
    add("aligned", *mimicry, FLAG, epochs=1, change=TinyEncoders())
    add("aligned, a folder", *mimicry, aligned(trainer), epochs=1)
    add("spaces", *columns, "group.txt", *shard, "--text-key", "caption; txt", epochs=1, code=1)
    return runs


def aligned(trainer: Trainer) -> str:
    """The folder of two tiny encoders in one space."""
    folder = str(trainer.directory / "aligned")
    with pytest.MonkeyPatch.context() as patch:
        put_tiny_encoders(patch)
        write_aligned(folder, "--data", str(trainer.directory / "data.csv"))
    return folder


def table_of_groups(trainer: Trainer) -> list[str]:
    """A CSV file in which every second pair has a partner, the next such one."""
    groups = [i // 4 if i % 2 else 100 + i for i in range(SAMPLES)]
    rows = [[*row[:2], f"group {x}"] for row, x in zip(trainer.rows, groups, strict=True)]
    file = trainer.directory / "main-groups.csv"
    file.write_text("".join("\t".join(row) + "\n" for row in [["filepath", "title", "group"], *rows]))
    return ["--train-data", str(file)]


def blank_captions(trainer: Trainer) -> list[str]:
    """A shard in which every pair has one partner, and samples with a blank caption have none."""
    file, picture = trainer.directory / "blank.tar", Path(trainer.rows[0][0]).read_bytes()
    with tarfile.open(file, "w") as shard:
        for i, (name, title, _) in enumerate(trainer.rows):
            group = {"group.txt": f"{i // 2}".encode()}
            add_sample(shard, f"{i:03}", png=Path(name).read_bytes(), txt=title.encode(), **group)
        for i in range(SAMPLES, 2 * SAMPLES):
            add_sample(shard, f"{i:03}", png=picture, txt=b" \n", **{"group.txt": f"alone {i}".encode()})
    return [*trainer.webdataset, "--train-data", str(file)]


def trained(
    trainer: Trainer, python_path: str, runs: dict[str, tuple[list[str], dict[str, Any]]]
) -> dict[str, Run]:
    """Write the tiny model that reads pictures of any size, and make the runs."""
    vision = {"image_size": 64, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False}
    pooled = {"timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": 16, "vocab_size": 49408, "heads": 2, "width": 32, "layers": 1}
    towers = {"custom_text": True, "vision_cfg": {**vision, **pooled}, "text_cfg": text}
    trainer.write_model("tiny-naflex", towers)
    file = trainer.directory / "main.pickle"
    file.write_bytes(pickle.dumps((trainer, runs)))
    trainer.python("-c", ALL_RUNS, str(file), PYTHONPATH=python_path)
    done: dict[str, Run] = pickle.loads(file.read_bytes())
    return done


def linear_lambdas(steps: int) -> dict[int, float]:
    """λ of each step of a training of so many, by the schedule ``linear``."""
    return {step: schedules.linear(step + 1, steps) for step in range(steps)}


def compiled_frames_and_breaks(run: Run) -> tuple[int, int]:
    """The compiled frames and graph breaks that ``NoRecompilation`` printed at the end of a run."""
    ((frames, breaks),) = re.findall(r"compiled frames: (\d+) graph breaks: (\d+)", run.output)
    return int(frames), int(breaks)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lambda_changes_without_a_recompilation(main_runs: dict[str, Run], strategy: str) -> None:
    """A recompilation would have ended the run with an error."""
    run = main_runs[strategy]
    frames, _ = compiled_frames_and_breaks(run)
    assert frames > 0
    assert run.scalars["rank_lambda"] == pytest.approx(linear_lambdas(STEPS))


def test_a_compiled_task_calls_the_loss_once_between_two_graphs(main_runs: dict[str, Run]) -> None:
    _, breaks = compiled_frames_and_breaks(main_runs["task"])
    assert breaks == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_compiled_training_logs_the_values_of_an_eager_one(
    main_runs: dict[str, Run], strategy: str
) -> None:
    run, eager = main_runs[strategy], main_runs["steps"]
    for name in (*TERMS, "loss", "cross_modal_raw", "in_modal_raw"):
        # In a graph the raw terms are NaN while λ is 0, where the eager run logs nothing.
        logged = {step: value for step, value in run.scalars[name].items() if not math.isnan(value)}
        assert logged == pytest.approx(eager.scalars[name], rel=1e-5), name


def test_fsdp2_trains_as_one_process_with_the_whole_batch(main_runs: dict[str, Run]) -> None:
    """The values of every step, and the weights at the end."""
    fsdp, single = main_runs["fsdp"], main_runs["whole batch"]
    assert "world_size: 2" in fsdp.log
    assert len(fsdp.train_lines()) == EPOCHS
    for name in (*TERMS, *METRICS, "loss"):
        # Weights that differ by a rounding change the order of a few close pairs of items.
        tolerance = 1e-3 if name.endswith("_tau") else 1e-5
        assert fsdp.scalars[name] == pytest.approx(single.scalars[name], rel=1e-4, abs=tolerance), name
    sharded, whole = fsdp.tensors_after_epoch(EPOCHS), single.tensors_after_epoch(EPOCHS)
    weights = [name for name in whole if not name.startswith("optimizer.")]
    assert "visual.proj" in weights
    for name in weights:
        of_fsdp, of_single = trained_part(name, sharded[name]), trained_part(name, whole[name])
        torch.testing.assert_close(of_fsdp, of_single, rtol=1e-3, atol=1e-4, msg=name)


def trained_part(name: str, weight: torch.Tensor) -> torch.Tensor:
    """All but the attention's key bias: softmax cancels it, so AdamW makes steps of a gradient's rounding."""
    if not name.endswith("in_proj_bias"):
        return weight
    query, _key, value = weight.chunk(3)
    return torch.cat([query, value])


def assert_loss_is_sum_of_terms(run: Run) -> None:
    """Check the logged loss of every step, and that it has no other terms than the three of RankCLIP."""
    assert [key for key in run.scalars if key.endswith("_loss")] == TERMS
    assert run.scalars["loss"], "the loss of some steps is logged"
    for step, loss in run.scalars["loss"].items():
        assert loss == pytest.approx(sum(run.scalars[term][step] for term in TERMS), rel=1e-6)


def test_a_task_trains_the_sum_of_the_terms(main_runs: dict[str, Run]) -> None:
    run = main_runs["single"]
    assert re.search(r"Loss: rankclip .*, open_clip 4\.2\.0\.dev0", run.log)
    assert_loss_is_sum_of_terms(run)


def test_a_task_trains_what_stock_does_until_lambda_grows(main_runs: dict[str, Run]) -> None:
    """In the official schedule λ is 0 in the first epoch, and no longer in the second."""
    stock, run = main_runs["stock"], main_runs["single"]
    assert "rank" not in "".join(stock.scalars)
    assert_equal_training(stock, run, epochs=(1,))
    assert not torch.equal(
        stock.tensors_after_epoch(2)["visual.proj"], run.tensors_after_epoch(2)["visual.proj"]
    )


@pytest.mark.parametrize(
    ("name", "named_option"),
    [("generative", "naflexgenlip_b16"), ("audio", "--dataset-type synthetic-audio")],
)
def test_a_training_without_contrastive_pairs_is_refused(
    main_runs: dict[str, Run], name: str, named_option: str
) -> None:
    assert re.search(f"argument --loss: rankclip .*{named_option}", main_runs[name].output)


def test_lambda_counts_the_steps_where_batches_change_their_size(main_runs: dict[str, Run]) -> None:
    """64 tokens in a step: 4 pictures of 16 tokens, or 16 of 4 tokens."""
    run = main_runs["naflex"]
    pairs_seen = [0, *map(int, re.findall(r"Train Epoch: 0 \[ *(\d+)/", run.log))]
    assert {after - before for before, after in itertools.pairwise(pairs_seen)} == {4, 16}
    assert run.scalars["rank_lambda"] == pytest.approx(linear_lambdas(steps=len(pairs_seen) - 1))
    assert_loss_is_sum_of_terms(run)


def test_columns_of_a_table_train_alike_accumulated_and_on_two_processes(main_runs: dict[str, Run]) -> None:
    """Every second pair of the table has a partner, which only the column tells."""
    whole = main_runs["csv"].scalars
    assert {*whole["pairs_with_partner"].values()} == {0.5}
    for name in ("csv, accumulated", "csv, fsdp"):
        for term in (*TERMS, "pairs_with_partner"):
            values = main_runs[name].scalars[term]
            assert values == pytest.approx(whole[term], rel=1e-3, abs=1e-5), (name, term)


def test_samples_with_a_blank_caption_are_not_trained_beside_a_column(main_runs: dict[str, Run]) -> None:
    """As without a column: open_clip's filter sees the caption alone. All other samples have a partner."""
    assert {*main_runs["blank"].scalars["pairs_with_partner"].values()} == {1.0}


def test_a_text_key_with_a_space_ends_as_without_a_column(main_runs: dict[str, Run]) -> None:
    """The trainer strips the key in one place, and webdataset asserts in the next that it has no space."""
    assert "AssertionError" in main_runs["spaces"].output
    assert "Train Epoch" not in main_runs["spaces"].output


def test_two_encoders_in_one_space_train_as_their_folder_bit_for_bit(main_runs: dict[str, Run]) -> None:
    assert_equal_training(main_runs["aligned"], main_runs["aligned, a folder"], (1,))
