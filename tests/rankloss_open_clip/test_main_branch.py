"""open_clip's main branch: tasks, FSDP2, and three ways to compile.

It is not released, so a checkout has to be at hand; the tests run only where the environment names one:

    RANKLOSS_OPEN_CLIP_CHECKOUT=…/open_clip python -m pytest tests/rankloss_open_clip/test_main_branch.py
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest
import torch
from trainer_runs import OFF, OFFICIAL, STEPS, Run, Runs, Trainer

from rankloss import schedules

CHECKOUT = os.environ.get("RANKLOSS_OPEN_CLIP_CHECKOUT", "")
TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"]
EPOCHS = 3
STRATEGIES = ("task", "step", "model")
WHOLE_BATCH = ["--aug-cfg", "scale=(1.0,1.0)", "--rankclip-agreement-every", "1"]  # one step an epoch
PER_STEP = ["--loss", "rankclip", "--rankclip-schedule", "linear", "--rankclip-schedule-unit", "step"]
# A run in which recompiling a function is an error, and which prints how many were compiled.
COMPILED = """
import sys
import torch._dynamo.config, open_clip
from open_clip_train.main import main
from torch._dynamo.utils import counters
torch._dynamo.config.error_on_recompile = True
main(sys.argv[1:])
print("compiled frames:", counters["frames"]["ok"], "graph breaks:", sum(counters["graph_break"].values()))
"""

pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="RANKLOSS_OPEN_CLIP_CHECKOUT names no checkout of open_clip's main branch"
)


@pytest.fixture(scope="module")
def path() -> str:
    """A PYTHONPATH on which the checkout comes first."""
    return os.pathsep.join(filter(None, [str(Path(CHECKOUT, "src")), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module")
def main_runs(trainer: Trainer, path: str) -> Runs:
    table = Runs()

    def run(name: str, *options: str, command: tuple[str, ...] = (), **environment: str) -> Run:
        options = ("--epochs", str(EPOCHS), *options)
        return trainer.run(f"main {name}", *options, command=command, PYTHONPATH=path, **environment)

    def add(name: str, *options: str, **keywords: object) -> None:
        table.add(name, run, name, *options, **keywords)

    add("steps", *PER_STEP)
    add("single", *OFFICIAL)
    add("stock", **OFF)
    add("whole batch", *OFFICIAL, *WHOLE_BATCH, "--batch-size", "64")
    # `--` keeps it from taking the trainer's --logs for an option of its own.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    fsdp = ["--fsdp", "--local-loss", "--gather-with-grad", *WHOLE_BATCH, "--batch-size", "32"]
    add("fsdp", *OFFICIAL, *fsdp, command=(*launcher, "open_clip_train.main"))
    eager = ["--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy"]
    for strategy in STRATEGIES:
        add(strategy, *PER_STEP, *eager, strategy, command=("-c", COMPILED))
    return table


LAMBDAS = {step: schedules.linear(step + 1, EPOCHS * STEPS) for step in range(EPOCHS * STEPS)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lambda_changes_without_a_recompilation(main_runs: Runs, strategy: str) -> None:
    run, eager = main_runs[strategy], main_runs["steps"]
    (frames, breaks) = map(int, re.findall(r"compiled frames: (\d+) graph breaks: (\d+)", run.output)[0])
    assert frames > 0
    if strategy == "task":
        assert breaks == 1, "the loss is one call between two graphs"
    assert run.scalars["rank_lambda"] == pytest.approx(LAMBDAS)
    for name in (*TERMS, "loss", "cross_modal_raw", "in_modal_raw"):
        assert run.scalars[name] == pytest.approx(eager.scalars[name], rel=1e-5), name


def test_fsdp2_trains_as_one_process_with_the_whole_batch(main_runs: Runs) -> None:
    fsdp, single = main_runs["fsdp"], main_runs["whole batch"]
    assert "world_size: 2" in fsdp.log
    assert len(fsdp.train_lines()) == EPOCHS
    for name in (*TERMS, *METRICS, "loss"):
        # Weights that differ by a rounding change the order of a few close pairs of items.
        tolerance = 1e-3 if name.endswith("_tau") else 1e-5
        assert fsdp.scalars[name] == pytest.approx(single.scalars[name], rel=1e-4, abs=tolerance), name
    sharded, whole = fsdp.epoch(EPOCHS), single.epoch(EPOCHS)
    for name in whole:
        if not name.startswith("optimizer."):
            one, other = (trained_part(name, weights[name]) for weights in (sharded, whole))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def trained_part(name: str, weight: torch.Tensor) -> torch.Tensor:
    """All but the attention's key bias: softmax cancels it, so AdamW makes steps of a gradient's rounding."""
    if not name.endswith("in_proj_bias"):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


def test_task_trains_the_sum_of_the_terms(main_runs: Runs) -> None:
    run = main_runs["single"]
    version = re.findall(r"'(.+)'", Path(CHECKOUT, "src/open_clip/version.py").read_text())[0]
    assert f"open_clip {version}" in run.log
    assert [key for key in run.scalars if key.endswith("_loss")] == TERMS
    for step, loss in run.scalars["loss"].items():
        assert loss == pytest.approx(sum(run.scalars[term][step] for term in TERMS), rel=1e-6)


def test_epoch_at_lambda_zero_is_bit_equal_to_stock(main_runs: Runs) -> None:
    stock, run = main_runs["stock"], main_runs["single"]
    for epoch, equal in ((1, True), (2, False)):
        weights, others = stock.epoch(epoch), run.epoch(epoch)
        assert weights.keys() == others.keys()
        assert all(torch.equal(value, others[name]) for name, value in weights.items()) is equal
    assert "rank" not in "".join(stock.scalars)


def test_generative_task_is_refused(trainer: Trainer, path: str) -> None:
    done = trainer.run(
        "main generative", "--model", "naflexgenlip_b16", "--loss", "rankclip", PYTHONPATH=path
    )
    assert done.returncode == 2
    assert "argument --loss: rankclip does not work with naflexgenlip_b16" in done.output


def test_audio_is_refused(trainer: Trainer, path: str) -> None:
    options = ("--dataset-type", "synthetic-audio", "--model", "CLAP-HTSAT-tiny-Roberta-base")
    done = trainer.run("main audio", *options, "--loss", "rankclip", PYTHONPATH=path)
    assert done.returncode == 2
    assert "argument --loss: rankclip compares images with texts" in done.output


def test_naflex_batches_change_their_size(trainer: Trainer, path: str) -> None:
    """Few large pictures in one step, many small ones in the next: λ counts the steps of the schedule."""
    vision = {"image_size": 64, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False}
    text = {"context_length": 16, "vocab_size": 49408, "heads": 2, "width": 32, "layers": 1}
    config = {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {**vision, "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": text,
    }
    trainer._write_model("tiny-naflex", config)
    sizes = ("--naflex-seq-lens", "4", "16", "--naflex-patch-sizes", "16")
    batches = ("--naflex-max-tokens-per-batch", "64", "--naflex-batch-divisor", "4")
    model = ("--model", f"local-dir:{trainer.directory / 'tiny-naflex'}", "--epochs", "1")
    options = (*PER_STEP, *model, "--use-naflex", *sizes, *batches, *trainer.webdataset)
    run = trainer.run("main naflex", *options, PYTHONPATH=path)
    assert run.returncode == 0, run.output[-4000:]
    seen = [0, *map(int, re.findall(r"Train Epoch: 0 \[ *(\d+)/", run.log))]
    assert {after - before for before, after in itertools.pairwise(seen)} == {4, 16}
    steps = len(seen) - 1
    assert run.scalars["rank_lambda"] == pytest.approx(
        {step: schedules.linear(step + 1, steps) for step in range(steps)}
    )
    for step, total in run.scalars["loss"].items():
        assert total == pytest.approx(sum(run.scalars[name][step] for name in TERMS), rel=1e-6)
