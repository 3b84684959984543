"""The trainer in several processes against one, from checkpoints and logs.

Every step takes all pairs, so that however they are dealt out to processes and micro-batches, it is the same
step. The optimizer is SGD: its momentum after the first step is that step's gradient, and its steps are
proportional to gradients, where Adam's would be signs of rounding errors as well.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler
from trainer_runs import BOTH, OFFICIAL, SAMPLES, Run, Runs, Trainer

import one_process
from batches import relative_error

RANK_WEIGHT = 8.0  # makes the rank terms' share of the gradient far larger than CLIP's rounding error
LAMBDA = RANK_WEIGHT / 16
OPTIONS = [
    *("--epochs", "2", "--aug-cfg", "scale=(1.0,1.0)", "--opt", "timm/sgd", "--lr", "0.001", "--wd", "0"),
    *("--loss", "rankclip", "--rankclip-schedule", "constant"),
    *("--rankclip-lambda-cross", f"{RANK_WEIGHT}", "--rankclip-lambda-in", f"{RANK_WEIGHT}"),
]
WARNING = "local_loss without gather_with_grad"


@pytest.fixture(scope="module")
def ddp_runs(trainer: Trainer) -> Runs:
    table = Runs()

    def add(
        name: str, *options: str, processes: int = 1, accum_freq: int = 1, samples: int = SAMPLES
    ) -> None:
        sizes = ("--batch-size", str(samples // processes // accum_freq), "--accum-freq", str(accum_freq))
        # Other tests have runs of these names, in the same directory.
        table.add(name, trainer.call, f"ddp {name}", *OPTIONS, *sizes, *options, processes=processes)

    add("one process")
    add("two processes, both flags", *BOTH, processes=2)
    add("two processes, neither flag", processes=2)
    add("accumulation", accum_freq=2)
    add("two processes, gather_with_grad", "--gather-with-grad", processes=2)
    add("accumulation, two processes", *BOTH, processes=2, accum_freq=2)
    siglip = ("--siglip", "--local-loss")  # by which the sigmoid loss and its companions are not moved
    add("siglip", *siglip)
    add("siglip, four processes", *siglip, "--loss-dist-impl", "gather", processes=4)
    # 64 pairs cannot be divided among three processes; 63 can.
    rows = (trainer.directory / "data.csv").read_text().splitlines()[:-1]
    (trainer.directory / "63 pairs.csv").write_text("\n".join(rows) + "\n")
    pairs = ("--train-data", str(trainer.directory / "63 pairs.csv"))
    add("63 pairs", *pairs, samples=63)
    add("63 pairs, three processes", *pairs, *BOTH, processes=3, samples=63)
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


def test_neither_flag_gives_towers_half_of_the_gradient_and_the_scale_all_of_it(ddp_runs: Runs) -> None:
    one, two = ddp_runs["one process"], ddp_runs["two processes, neither flag"]
    (scale, towers), (whole_scale, whole_towers) = gradient(two), gradient(one)
    assert relative_error(towers, whole_towers / 2) < 1e-5
    assert relative_error(scale, whole_scale) < 1e-5
    assert_same_log(two, one)


def rank_0_of_2(epoch: int) -> list[int]:
    sampler: DistributedSampler[int] = DistributedSampler(range(SAMPLES), num_replicas=2, rank=0)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


def features(trainer: Trainer, run: Run, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the model of a checkpoint makes of the trainer's data, and its scale."""
    name = f"local-dir:{trainer.directory / 'tiny'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(weights(run, epoch))
    rows = [line.split("\t") for line in (trainer.directory / "data.csv").read_text().splitlines()[1:]]
    images = torch.stack([preprocess(Image.open(Path(path))) for path, _ in rows])
    texts = open_clip.get_tokenizer(name)([title for _, title in rows])
    with torch.no_grad():
        v, t, s = model.eval()(images, texts)
    return v.double(), t.double(), s.double()


def test_logged_loss_under_local_loss_is_that_of_rank_0s_rows(trainer: Trainer, ddp_runs: Runs) -> None:
    run = ddp_runs["two processes, both flags"]
    v, t, s = features(trainer, run, epoch=1)
    own = rank_0_of_2(epoch=1)
    order = own + sorted(set(range(SAMPLES)) - set(own))
    view = one_process.View(v[order], t[order], s, v[own], t[own], first=0)
    expected = {
        "contrastive_loss": one_process.clip(view),
        "cross_modal_loss": LAMBDA * one_process.cross(view),
        "in_modal_loss": LAMBDA * one_process.in_(view),
    }
    for name, value in {**expected, "loss": sum(expected.values())}.items():
        assert run.scalars[name][1] == pytest.approx(float(value), rel=5e-5), name
    # It differs from the whole batch's, which one process logs.
    assert run.scalars["loss"][1] != pytest.approx(ddp_runs["one process"].scalars["loss"][1], rel=1e-4)


@pytest.mark.parametrize(
    "name", ["accumulation", pytest.param("accumulation, two processes", marks=pytest.mark.slow)]
)
def test_accumulation_is_the_big_batch_with_the_scale_k_times(ddp_runs: Runs, name: str) -> None:
    accumulated, whole = ddp_runs[name], ddp_runs["one process"]
    (scale, towers), (whole_scale, whole_towers) = gradient(accumulated), gradient(whole)
    assert relative_error(towers, whole_towers) < 1e-5
    assert relative_error(scale, 2 * whole_scale) < 1e-5
    if name == "accumulation":
        assert_same_log(accumulated, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "several", "world_size"),
    [
        ("one process", "two processes, gather_with_grad", 2),
        ("63 pairs", "63 pairs, three processes", 3),
        ("siglip", "siglip, four processes", 4),
    ],
)
def test_three_and_four_processes_train_as_one_does(
    ddp_runs: Runs, one: str, several: str, world_size: int
) -> None:
    run = ddp_runs[several]
    assert run.params["world_size"] == str(world_size)
    assert_same_training(run, ddp_runs[one])
    assert WARNING not in run.output


@pytest.mark.slow
def test_static_graph_bears_the_step_from_lambda_zero(ddp_runs: Runs) -> None:
    one, two = ddp_runs["checkpointing"], ddp_runs["static graph"]
    assert two.params["ddp_static_graph"] == "True"
    assert list(two.scalars["rank_lambda"].values()) == [0.0, 2.0]
    assert_same_training(two, one)
