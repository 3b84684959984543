"""The trainer in several processes against one, from checkpoints and logs.

Every step takes all pairs, so that however they are dealt out to processes and micro-batches, it is the same
step. The optimizer is SGD: its momentum after the first step is that step's gradient, and its steps are
proportional to gradients, where Adam's would be signs of rounding errors as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trainer_runs import BOTH, OFFICIAL, SAMPLES, Run, Runs, Trainer

from batches import relative_error

RANK_WEIGHT = 8.0  # makes the rank terms' share of the gradient far larger than CLIP's rounding error
OPTIONS = [
    *("--epochs", "2", "--aug-cfg", "scale=(1.0,1.0)", "--opt", "timm/sgd", "--lr", "0.001", "--wd", "0"),
    *("--loss", "rankclip", "--rankclip-schedule", "constant"),
    *("--rankclip-lambda-cross", f"{RANK_WEIGHT}", "--rankclip-lambda-in", f"{RANK_WEIGHT}"),
]


@pytest.fixture(scope="module")
def ddp_runs(trainer: Trainer) -> Runs:
    table = Runs()

    def add(name: str, *options: str, processes: int = 1, accum_freq: int = 1) -> None:
        sizes = ("--batch-size", str(SAMPLES // processes // accum_freq), "--accum-freq", str(accum_freq))
        # Other tests have runs of these names, in the same directory.
        table.add(name, trainer.call, f"ddp {name}", *OPTIONS, *sizes, *options, processes=processes)

    add("one process")
    add("two processes, both flags", *BOTH, processes=2)
    add("accumulation", accum_freq=2)
    # λ goes from 0 to 2; a static graph allows no change in what is trained.
    checkpointing = (*OFFICIAL, "--grad-checkpointing")
    add("checkpointing", *checkpointing)
    add("static graph", *checkpointing, *BOTH, "--ddp-static-graph", processes=2)
    return table


def weights(run: Run, epoch: int) -> dict[str, Tensor]:
    return {name: x for name, x in run.epoch(epoch).items() if not name.startswith("optimizer.")}


def scale_and_towers(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tensors = dict(tensors)
    scale = tensors.pop("logit_scale")
    return scale, torch.cat([x.flatten() for x in tensors.values()])


def gradient(run: Run) -> tuple[Tensor, Tensor]:
    """The gradient of the first step, by the scale and by everything else."""
    checkpoint = run.epoch(1)
    names = list(weights(run, 1))  # the optimizer numbers the parameters in this order
    momenta = [checkpoint[f"optimizer.{index}.momentum_buffer"] for index in range(len(names))]
    assert all(x.shape == w.shape for x, w in zip(momenta, weights(run, 1).values(), strict=True))
    return scale_and_towers(dict(zip(names, momenta, strict=True)))


def second_step(run: Run) -> tuple[Tensor, Tensor]:
    before, after = weights(run, 1), weights(run, 2)
    return scale_and_towers({name: after[name] - before[name] for name in before})


def assert_same_training(actual: Run, expected: Run) -> None:
    for x, whole in zip(gradient(actual), gradient(expected), strict=True):
        assert relative_error(x, whole) < 1e-5
    (scale, towers), (whole_scale, whole_towers) = second_step(actual), second_step(expected)
    assert relative_error(towers, whole_towers) < 1e-4
    assert scale.item() == pytest.approx(whole_scale.item(), abs=2e-6)  # its own last digits, near 2.7


def assert_same_log(actual: Run, expected: Run) -> None:
    terms = [name for name in expected.scalars if name.endswith("loss")]
    assert {"cross_modal_loss", "in_modal_loss", "loss"} < set(terms)
    for name in terms:
        assert actual.scalars[name][0] == pytest.approx(expected.scalars[name][0], rel=1e-5), name


def test_both_flags_train_as_one_process_does(ddp_runs: Runs) -> None:
    one, two = ddp_runs["one process"], ddp_runs["two processes, both flags"]
    assert (one.params["world_size"], two.params["world_size"]) == ("1", "2")
    assert_same_training(two, one)


def test_accumulation_is_the_big_batch_with_the_scale_k_times(ddp_runs: Runs) -> None:
    accumulated, whole = ddp_runs["accumulation"], ddp_runs["one process"]
    (scale, towers), (whole_scale, whole_towers) = gradient(accumulated), gradient(whole)
    assert relative_error(towers, whole_towers) < 1e-5
    assert relative_error(scale, 2 * whole_scale) < 1e-5
    assert_same_log(accumulated, whole)


def test_static_graph_bears_the_step_from_lambda_zero(ddp_runs: Runs) -> None:
    one, two = ddp_runs["checkpointing"], ddp_runs["static graph"]
    assert two.params["ddp_static_graph"] == "True"
    assert list(two.scalars["rank_lambda"].values()) == [0.0, 2.0]
    assert_same_training(two, one)
