"""open_clip's main branch: tasks, FSDP2, three ways to compile, and batches that change their size."""

from __future__ import annotations

import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from trainer_runs import BOTH, OFFICIAL, STEPS, NoRecompilation, Run, Trainer, assert_equal_training

from open_clip_main import unpacked
from rankloss import schedules

pytestmark = pytest.mark.slow

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"]
EPOCHS = 3
STRATEGIES = ("task", "step", "model")
WHOLE_BATCH = ["--aug-cfg", "scale=(1.0,1.0)", "--loss-agreement-every", "1"]  # one step an epoch
PER_STEP = ["--loss", "rankclip", "--rankclip-schedule", "linear", "--loss-schedule-unit", "step"]
# Runs that are forked from one process, which has imported the trainer.
ALL_RUNS = """
import pickle, sys
trainer, runs = pickle.load(open(sys.argv[1], "rb"))
done = {name: trainer.call(f"main {name}", *given, **more) for name, (given, more) in runs.items()}
pickle.dump(done, open(sys.argv[1], "wb"))
"""


@pytest.fixture(scope="module")
def main_runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return trained(trainer, unpacked(tmp_path_factory.mktemp("main")), runs_of(trainer))


def runs_of(trainer: Trainer) -> dict[str, Any]:
    """The options of each run, and the keywords of its start."""
    runs = {}

    def add(name: str, *options: str, epochs: int = EPOCHS, **keywords: object) -> None:
        runs[name] = (["--epochs", str(epochs), *options], keywords)

    add("steps", *PER_STEP, epochs=1)
    add("single", *OFFICIAL)
    add("stock")
    add("whole batch", *OFFICIAL, *WHOLE_BATCH, "--batch-size", "64")
    add("fsdp", *OFFICIAL, "--fsdp", *BOTH, *WHOLE_BATCH, "--batch-size", "32", processes=2)
    eager = ["--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy"]
    for strategy in STRATEGIES:
        add(strategy, *PER_STEP, *eager, strategy, epochs=1, change=NoRecompilation())
    model = ("--model", f"local-dir:{trainer.directory / 'tiny-naflex'}", "--use-naflex")
    sizes = ("--naflex-seq-lens", "4", "16", "--naflex-patch-sizes", "16")
    batches = ("--naflex-max-tokens-per-batch", "64", "--naflex-batch-divisor", "4")
    add("naflex", *PER_STEP, *model, *sizes, *batches, *trainer.webdataset, epochs=1)
    add("generative", *OFFICIAL, "--model", "naflexgenlip_b16", code=2)
    audio = ("--dataset-type", "synthetic-audio", "--model", "CLAP-HTSAT-tiny-Roberta-base")
    add("audio", *OFFICIAL, *audio, code=2)
    return runs


def trained(trainer: Trainer, path: str, runs: dict[str, Any]) -> dict[str, Run]:
    vision = {"image_size": 64, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False}
    pooled = {"timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": 16, "vocab_size": 49408, "heads": 2, "width": 32, "layers": 1}
    towers = {"custom_text": True, "vision_cfg": {**vision, **pooled}, "text_cfg": text}
    trainer.write_model("tiny-naflex", towers)
    file = trainer.directory / "main.pickle"
    file.write_bytes(pickle.dumps((trainer, runs)))
    trainer.python("-c", ALL_RUNS, str(file), PYTHONPATH=path)
    done: dict[str, Run] = pickle.loads(file.read_bytes())
    return done


LAMBDAS = {step: schedules.linear(step + 1, STEPS) for step in range(STEPS)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lambda_changes_without_a_recompilation(main_runs: dict[str, Run], strategy: str) -> None:
    run, eager = main_runs[strategy], main_runs["steps"]
    (frames, breaks) = map(int, re.findall(r"compiled frames: (\d+) graph breaks: (\d+)", run.output)[0])
    assert frames > 0
    if strategy == "task":
        assert breaks == 1, "the loss is one call between two graphs"
    assert run.scalars["rank_lambda"] == pytest.approx(LAMBDAS)
    for name in (*TERMS, "loss", "cross_modal_raw", "in_modal_raw"):
        trained = {step: x for step, x in run.scalars[name].items() if x == x}  # NaN while λ is 0
        assert trained == pytest.approx(eager.scalars[name], rel=1e-5), name


def test_fsdp2_trains_as_one_process_with_the_whole_batch(main_runs: dict[str, Run]) -> None:
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


def test_task_trains_the_sum_of_the_terms_and_at_lambda_zero_what_stock_does(
    main_runs: dict[str, Run],
) -> None:
    stock, run = main_runs["stock"], main_runs["single"]
    assert re.search(r"Loss: rankclip .*, open_clip 4\.2\.0\.dev0", run.log)
    assert [key for key in run.scalars if key.endswith("_loss")] == TERMS
    for step, loss in run.scalars["loss"].items():
        assert loss == pytest.approx(sum(run.scalars[term][step] for term in TERMS), rel=1e-6)
    assert_equal_training(stock, run, epochs=(1,))
    assert not torch.equal(stock.epoch(2)["visual.proj"], run.epoch(2)["visual.proj"])
    assert "rank" not in "".join(stock.scalars)


@pytest.mark.parametrize(
    ("name", "named"), [("generative", "naflexgenlip_b16"), ("audio", "--dataset-type synthetic-audio")]
)
def test_what_has_no_contrastive_pairs_is_refused(main_runs: dict[str, Run], name: str, named: str) -> None:
    assert re.search(f"argument --loss: rankclip .*{named}", main_runs[name].output)


def test_naflex_batches_change_their_size(main_runs: dict[str, Run]) -> None:
    """Few large pictures in one step, many small ones in the next: λ counts the steps of the schedule."""
    run = main_runs["naflex"]
    seen = [0, *map(int, re.findall(r"Train Epoch: 0 \[ *(\d+)/", run.log))]
    assert {after - before for before, after in itertools.pairwise(seen)} == {4, 16}
    steps = len(seen) - 1
    assert run.scalars["rank_lambda"] == pytest.approx(
        {step: schedules.linear(step + 1, steps) for step in range(steps)}
    )
    for step, total in run.scalars["loss"].items():
        assert total == pytest.approx(sum(run.scalars[name][step] for name in TERMS), rel=1e-6)
