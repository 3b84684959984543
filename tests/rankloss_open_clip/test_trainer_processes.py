"""Several processes: the losses that the plug-in builds there, and what the trainer makes of them.

Every step of a training takes all pairs, so that however they are dealt out to processes and batches, it is
the same step. The optimizer is SGD: its momentum after the first step is that step's gradient, and its steps
are proportional to gradients, where Adam's would be signs of rounding errors as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from teacher_features import TEACHER_FEATURES
from torch import Tensor
from trainer_runs import LOCAL_LOSS_WITH_GRAD, RANKCLIP_OFFICIAL, SAMPLES, Run, Runs, Trainer

from batches import random_batch, relative_error
from collectives import Collectives
from process_pool import Pools
from rankloss import metrics, reference
from rankloss_features.folder import NAMES
from stored_features import features_folder

# --- losses ---------------------------------------------------------------------------------------------

N, D, SCALE = 24, 6, 10.0  # the whole batch, on however many processes
LENGTH, VOCABULARY = 3, 5  # of CoCa's captions
CONSTANT = ["--loss", "rankclip", "--rankclip-schedule", "constant", "--rankclip-lambda-cross", "3"]
DISTIL = ["--distill-model", "tiny", "--distill-pretrained", "file"]
Terms = dict[str, list[Tensor]]  # by the terms' names: value, and gradients of image, text and scale


def built_loss(rank: int, world_size: int, base: str, argv: list[str]) -> torch.nn.Module:
    """The loss of CONSTANT as the trainer builds it in one process; its base is of the class ``base``."""
    args = parse_args([*CONSTANT, *argv])
    args.rank, args.world_size, args.distill = rank, world_size, args.distill_model is not None
    loss = open_clip.create_loss(args)
    assert type(loss.criterion.base).__name__ == base
    loss.start_epoch(0, args.epochs, 1, args.accum_freq)
    return loss


def outputs_of(argv: list[str]) -> dict[str, Tensor]:
    """What the model of a command line returns for the whole batch: features, and what its own loss needs."""
    v, t, s = random_batch(0, N, D, SCALE).leaves(torch.float64)
    outputs = {"image_features": v, "text_features": t, "logit_scale": s}
    generator = torch.Generator().manual_seed(0)
    if "coca_tiny" in argv:
        outputs["logits"] = torch.randn(N, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
        outputs["labels"] = torch.randint(1, VOCABULARY, (N, LENGTH), generator=generator)
    if "--distill-model" in argv:
        teacher = (x.detach() for x in random_batch(1, N, D, SCALE / 2).leaves(torch.float64))
        names = ("dist_image_features", "dist_text_features", "dist_logit_scale")
        outputs.update(zip(names, teacher, strict=True))
    if "--siglip" in argv:
        outputs["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)
    return outputs


def share_of(outputs: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The outputs for the pairs of one process; scalars are the same in each."""
    return {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in outputs.items()}


def trained_terms(rank: int, world_size: int, base: str, argv: list[str]) -> Terms:
    """The terms that this rank trains on its share of the batch, with gradients of the whole batch."""
    outputs = outputs_of(argv)
    loss = built_loss(rank, world_size, base, argv)
    entries = loss(**share_of(outputs, rank, world_size), output_dict=True)
    assert entries["rank_lambda"].item() == 1
    leaves = (outputs["image_features"], outputs["text_features"], outputs["logit_scale"])

    def gradients(value: Tensor) -> list[Tensor]:
        if not value.requires_grad:  # a caption loss, of logits that are constants here
            return [torch.zeros_like(x) for x in leaves]
        return list(torch.autograd.grad(value, leaves, retain_graph=True))

    values = {name: entry for name, entry in entries.items() if name.endswith("_loss")}
    return {name: [value.detach(), *gradients(value)] for name, value in values.items()}


every_base = pytest.mark.parametrize(
    ("base", "argv"),
    [
        (
            "CoCaLoss",
            ["--model", "coca_tiny", "--coca-contrastive-loss-weight", "0.5", *LOCAL_LOSS_WITH_GRAD],
        ),
        ("SigLipLoss", ["--siglip", "--loss-dist-impl", "gather", *LOCAL_LOSS_WITH_GRAD]),
        ("DistillClipLoss", [*DISTIL, *LOCAL_LOSS_WITH_GRAD]),
        ("ClipLoss", [*DISTIL, "--loss-teacher", "given", *LOCAL_LOSS_WITH_GRAD]),
    ],
)


@every_base
def test_on_every_base_two_processes_have_the_terms_and_gradients_of_one(
    pools: Pools, base: str, argv: list[str]
) -> None:
    whole = trained_terms(0, 1, base, argv)
    assert {"contrastive_loss", "cross_modal_loss", "in_modal_loss"} <= whole.keys()
    first, second = pools[2].run(trained_terms, base, argv)
    for name, expected in whole.items():
        # The value, and the gradient of each input; DDP averages them.
        averages = [(x + y) / 2 for x, y in zip(first[name], second[name], strict=True)]
        torch.testing.assert_close(averages, expected, rtol=1e-10, atol=1e-14)


@every_base
def test_on_every_base_the_cross_modal_term_is_the_references(base: str, argv: list[str]) -> None:
    arrays = {name: x.detach().numpy() for name, x in outputs_of(argv).items()}
    features = {name: arrays[name] for name in ("image_features", "text_features", "logit_scale")}
    teacher = {}
    if "--loss-teacher" in argv:
        teacher = {f"reference_{name}": arrays[f"dist_{name}"] for name in NAMES}
    lambda_cross, share_of_recipe = 3, 1 / 16  # in CONSTANT; of the default recipe
    expected = lambda_cross * share_of_recipe * reference.cross_modal(**features, **teacher)
    value, *_gradients = trained_terms(0, 1, base, argv)["cross_modal_loss"]
    assert value.item() == pytest.approx(expected, rel=1e-10)


def logged_agreement(rank: int, world_size: int, flags: list[str]) -> list[dict[str, float]]:
    """The agreement, Kendall's τ, that three steps log; the first and the third measure it."""
    argv = ["--loss-agreement-every", "2", *flags]
    loss = built_loss(rank, world_size, "ClipLoss", argv)
    outputs = share_of(outputs_of(argv), rank, world_size)
    steps = [loss(**outputs, output_dict=True) for _ in range(2)]
    with Collectives() as calls:  # of the third step
        steps.append(loss(**outputs, output_dict=True))
    assert calls.counts["allgather"] == 2, "each modality once, for the loss and the log"
    return [{name: x.item() for name, x in step.items() if name.endswith("tau")} for step in steps]


@pytest.mark.parametrize("flags", [[], LOCAL_LOSS_WITH_GRAD], ids=["global loss", "local loss"])
def test_every_process_logs_the_agreement_of_the_whole_batch(pools: Pools, flags: list[str]) -> None:
    batch = random_batch(0, N, D, SCALE).leaves(torch.float64)
    whole = metrics.rank_agreement(*batch[:2])
    expected = {name: whole[name].item() for name in ("cross_modal_tau", "in_modal_tau")}
    for steps in pools[2].run(logged_agreement, flags):
        assert len(steps) == 3
        for step in steps:
            assert step == pytest.approx(expected, abs=1e-6)


# --- trainings ------------------------------------------------------------------------------------------

OPTIONS = [
    *("--epochs", "2", "--aug-cfg", "scale=(1.0,1.0)", "--opt", "timm/sgd", "--lr", "0.001", "--wd", "0"),
    # The rank terms' share of the gradient is far larger than CLIP's rounding error.
    *(*CONSTANT, "--rankclip-lambda-cross", "8", "--rankclip-lambda-in", "8"),
]


@pytest.fixture(scope="module")
def ddp_runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of one process and of two, in pairs that make the same steps."""
    table = Runs()

    def add(name: str, *options: str, processes: int = 1) -> None:
        sizes = ("--batch-size", str(SAMPLES // processes))
        # Other tests have runs of these names, in the same directory.
        table.add(name, trainer.call, f"ddp {name}", *OPTIONS, *sizes, *options, processes=processes)

    # Each of them makes two steps, of all pairs.
    add("one process")
    add("two processes", *LOCAL_LOSS_WITH_GRAD, processes=2)
    # λ goes from 0 to 2; a static graph allows no change in what is trained.
    checkpointing = (*RANKCLIP_OFFICIAL, "--grad-checkpointing")
    add("checkpointing", *checkpointing)
    add("static graph", *checkpointing, *LOCAL_LOSS_WITH_GRAD, "--ddp-static-graph", processes=2)
    columns = columns_and_a_teacher(trainer, tmp_path_factory.mktemp("teacher"))
    add("columns", *columns)
    quarter = ("--batch-size", str(SAMPLES // 4), "--accum-freq", "2")
    add("columns, accumulated", *columns, *LOCAL_LOSS_WITH_GRAD, *quarter, processes=2)
    return table


def columns_and_a_teacher(trainer: Trainer, directory: Path) -> list[str]:
    """The options of a loss with ids of pairs and a teacher's features, beside the captions."""
    pairs = [(picture, title) for picture, title, _ in trainer.rows]
    rows = [("filepath", "title", "group")]
    rows += [(picture, title, f"group {i // 3}") for i, (picture, title) in enumerate(pairs)]
    file = trainer.directory / "ddp-columns.csv"
    file.write_text("".join("\t".join(row) + "\n" for row in rows))
    names_of_pairs = [(Path(picture).name, title) for picture, title in pairs]
    ids = ["--loss", "clip-ids+rankclip", "--clip-ids-key", "group"]
    return [
        *ids,
        "--loss-teacher",
        features_folder(directory / "x", names_of_pairs, **TEACHER_FEATURES),
        "--train-data",
        str(file),
    ]


class OfModel(NamedTuple):
    """A tensor, such as a gradient, for each parameter: of the scale, and of all others in one row."""

    scale: Tensor
    towers: Tensor


def of_model(tensors: dict[str, Tensor]) -> OfModel:
    """Tensors by the names of the model's parameters, the scale's apart."""
    towers = [x.flatten() for name, x in tensors.items() if name != "logit_scale"]
    return OfModel(tensors["logit_scale"], torch.cat(towers))


def parameters_of(run: Run, epoch: int) -> dict[str, Tensor]:
    """The model's parameters in the checkpoint of an epoch, in its order."""
    return {
        name: x for name, x in run.tensors_after_epoch(epoch).items() if not name.startswith("optimizer.")
    }


def first_gradient(run: Run) -> OfModel:
    """The gradient of the first step, which SGD's momentum is after it."""
    parameters, tensors = parameters_of(run, 1), run.tensors_after_epoch(1)
    # The optimizer numbers the parameters in this order.
    gradient = {name: tensors[f"optimizer.{i}.momentum_buffer"] for i, name in enumerate(parameters)}
    assert all(gradient[name].shape == x.shape for name, x in parameters.items())
    return of_model(gradient)


def second_step(run: Run) -> OfModel:
    """By how much the second step moves the parameters."""
    before, after = parameters_of(run, 1), parameters_of(run, 2)
    return of_model({name: after[name] - x for name, x in before.items()})


as_one_process = pytest.mark.parametrize(
    ("several", "one"),
    [
        ("two processes", "one process"),
        pytest.param("static graph", "checkpointing", marks=pytest.mark.slow),
    ],
)


@as_one_process
def test_the_first_gradient_of_two_processes_is_that_of_one(ddp_runs: Runs, several: str, one: str) -> None:
    assert [ddp_runs[name].params["world_size"] for name in (several, one)] == ["2", "1"]
    gradient, whole = first_gradient(ddp_runs[several]), first_gradient(ddp_runs[one])
    assert relative_error(gradient.towers, whole.towers) < 1e-5
    assert relative_error(gradient.scale, whole.scale) < 1e-5


@as_one_process
def test_the_second_step_of_two_processes_is_that_of_one(ddp_runs: Runs, several: str, one: str) -> None:
    step, whole = second_step(ddp_runs[several]), second_step(ddp_runs[one])
    assert relative_error(step.towers, whole.towers) < 1e-4
    # The scale is near 2.7, and float32 has seven digits of it.
    assert step.scale.item() == pytest.approx(whole.scale.item(), abs=2e-6)


@pytest.mark.slow
def test_lambda_grows_from_0_under_a_static_graph(ddp_runs: Runs) -> None:
    run = ddp_runs["static graph"]
    assert run.params["ddp_static_graph"] == "True"
    assert list(run.scalars["rank_lambda"].values()) == [0.0, 2.0]


@pytest.mark.slow
def test_columns_and_a_teacher_train_accumulated_on_processes_as_in_one(ddp_runs: Runs) -> None:
    several, one = ddp_runs["columns, accumulated"], ddp_runs["columns"]
    assert [run.params["world_size"] for run in (several, one)] == ["2", "1"]
    gradient, whole = first_gradient(several), first_gradient(one)
    assert relative_error(gradient.towers, whole.towers) < 1e-5
    # A trait of the trainer's accumulation: each of the two calls adds the whole gradient of the scale.
    assert relative_error(gradient.scale / 2, whole.scale) < 1e-5


@pytest.mark.slow
def test_accumulated_on_processes_the_partners_are_those_of_the_whole_batch(ddp_runs: Runs) -> None:
    """Partners are pairs with one id in one batch; a process has a quarter of it in a call."""
    several, one = ddp_runs["columns, accumulated"], ddp_runs["columns"]
    assert several.scalars["pairs_with_partner"] == pytest.approx(one.scalars["pairs_with_partner"])
