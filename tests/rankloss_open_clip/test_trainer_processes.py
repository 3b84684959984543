"""Several processes: the losses that the plug-in builds there, and what the trainer makes of them.

Every step of a training takes all pairs, so that however they are dealt out to processes and batches, it is
the same step. The optimizer is SGD: its momentum after the first step is that step's gradient, and its steps
are proportional to gradients, where Adam's would be signs of rounding errors as well.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from teacher_features import TEACHER
from torch import Tensor
from trainer_runs import BOTH, OFFICIAL, SAMPLES, Run, Runs, Trainer

from batches import random_batch, relative_error
from collectives import Collectives
from process_pool import Pools
from rankloss import metrics, reference
from rankloss_features.folder import NAMES
from stored_features import stored

# --- losses ---------------------------------------------------------------------------------------------

N, D, SCALE = 24, 6, 10.0  # the whole batch, on however many processes
LENGTH, VOCABULARY = 3, 5  # of CoCa's captions
CONSTANT = ["--loss", "rankclip", "--rankclip-schedule", "constant", "--rankclip-lambda-cross", "3"]
DISTIL = ["--distill-model", "tiny", "--distill-pretrained", "file"]
Terms = dict[str, list[Tensor]]  # by the terms' names: value, and gradients of image, text and scale


def built(rank: int, world_size: int, base: str, argv: list[str]) -> torch.nn.Module:
    """The loss as the trainer builds it."""
    args = parse_args([*CONSTANT, *argv])
    args.rank, args.world_size, args.distill = rank, world_size, args.distill_model is not None
    loss = open_clip.create_loss(args)
    assert type(loss.criterion.base).__name__ == base
    loss.start_epoch(0, args.epochs, 1, args.accum_freq)
    return loss


def outputs_of(argv: list[str]) -> dict[str, Tensor]:
    """Output of the model for the whole batch."""
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


def share(outputs: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    return {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in outputs.items()}


def terms(rank: int, world_size: int, base: str, argv: list[str]) -> Terms:
    """The terms that this rank trains."""
    outputs = outputs_of(argv)
    entries = built(rank, world_size, base, argv)(**share(outputs, rank, world_size), output_dict=True)
    assert entries["rank_lambda"].item() == 1
    by = (outputs["image_features"], outputs["text_features"], outputs["logit_scale"])

    def gradients(value: Tensor) -> list[Tensor]:
        if not value.requires_grad:  # a caption loss, of logits that are constants here
            return [torch.zeros_like(x) for x in by]
        return list(torch.autograd.grad(value, by, retain_graph=True))

    return {k: [x.detach(), *gradients(x)] for k, x in entries.items() if k.endswith("_loss")}


@pytest.mark.parametrize(
    ("base", "argv"),
    [
        ("CoCaLoss", ["--model", "coca_tiny", "--coca-contrastive-loss-weight", "0.5"]),
        ("SigLipLoss", ["--siglip", "--loss-dist-impl", "gather"]),
        ("DistillClipLoss", DISTIL),
        ("ClipLoss", [*DISTIL, "--loss-teacher", "given"]),
    ],
)
def test_every_base_has_the_terms_of_one_process(pools: Pools, base: str, argv: list[str]) -> None:
    argv = [*argv, *BOTH]
    of_ranks, whole = pools[2].run(terms, base, argv), terms(0, 1, base, argv)
    assert {"contrastive_loss", "cross_modal_loss", "in_modal_loss"} <= whole.keys()
    for name, expected in whole.items():
        for a, e in zip(zip(*(of_rank[name] for of_rank in of_ranks), strict=True), expected, strict=True):
            torch.testing.assert_close(torch.stack(a).mean(0), e, rtol=1e-10, atol=1e-14)  # as DDP averages
    given = {name: x.detach().numpy() for name, x in outputs_of(argv).items()}
    features = {name: given[name] for name in ("image_features", "text_features", "logit_scale")}
    teacher = {f"reference_{name}": given[f"dist_{name}"] for name in NAMES if "given" in argv}
    owed = 3 / 16 * reference.cross_modal(**features, **teacher)
    assert whole["cross_modal_loss"][0].item() == pytest.approx(owed, rel=1e-10)


def agreement(rank: int, world_size: int, flags: list[str]) -> list[dict[str, float]]:
    """The agreement that three steps log; the first and the third measure it."""
    argv = ["--loss-agreement-every", "2", *flags]
    loss, outputs = built(rank, world_size, "ClipLoss", argv), share(outputs_of(argv), rank, world_size)
    steps = [loss(**outputs, output_dict=True) for _ in range(2)]
    with Collectives() as calls:
        steps.append(loss(**outputs, output_dict=True))
    assert calls.counts["allgather"] == 2, "each modality once, for the loss and the log"
    return [{name: x.item() for name, x in step.items() if name.endswith("tau")} for step in steps]


@pytest.mark.parametrize("flags", [[], BOTH])
def test_every_process_logs_the_agreement_of_the_whole_batch(pools: Pools, flags: list[str]) -> None:
    batch = random_batch(0, N, D, SCALE).leaves(torch.float64)
    whole = metrics.rank_agreement(*batch[:2])
    expected = {name: whole[name].item() for name in ("cross_modal_tau", "in_modal_tau")}
    for steps in pools[2].run(agreement, flags):
        assert steps == [pytest.approx(expected, abs=1e-6)] * 3


# --- trainings ------------------------------------------------------------------------------------------

OPTIONS = [
    *("--epochs", "2", "--aug-cfg", "scale=(1.0,1.0)", "--opt", "timm/sgd", "--lr", "0.001", "--wd", "0"),
    # The rank terms' share of the gradient is far larger than CLIP's rounding error.
    *(*CONSTANT, "--rankclip-lambda-cross", "8", "--rankclip-lambda-in", "8"),
]


@pytest.fixture(scope="module")
def ddp_runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    table = Runs()

    def add(name: str, *options: str, processes: int = 1) -> None:
        sizes = ("--batch-size", str(SAMPLES // processes))
        # Other tests have runs of these names, in the same directory.
        table.add(name, trainer.call, f"ddp {name}", *OPTIONS, *sizes, *options, processes=processes)

    add("one process")
    add("two processes", *BOTH, processes=2)
    # λ goes from 0 to 2; a static graph allows no change in what is trained.
    checkpointing = (*OFFICIAL, "--grad-checkpointing")
    add("checkpointing", *checkpointing)
    add("static graph", *checkpointing, *BOTH, "--ddp-static-graph", processes=2)
    columns = columns_and_a_teacher(trainer, tmp_path_factory.mktemp("teacher"))
    add("columns", *columns)
    quarter = ("--batch-size", str(SAMPLES // 4), "--accum-freq", "2")
    add("columns, accumulated", *columns, *BOTH, *quarter, processes=2)
    return table


def columns_and_a_teacher(trainer: Trainer, directory: Path) -> list[str]:
    """The options of a loss with ids of pairs and a teacher's features, beside the captions."""
    rows = [[*row[:2], f"group {i // 3}"] for i, row in enumerate(trainer.rows)]
    file = trainer.directory / "ddp-columns.csv"
    file.write_text("".join("\t".join(row) + "\n" for row in [["filepath", "title", "group"], *rows]))
    pairs = [(Path(row[0]).name, row[1]) for row in rows]
    ids = ["--loss", "clip-ids+rankclip", "--clip-ids-key", "group"]
    return [*ids, "--loss-teacher", stored(directory / "x", pairs, **TEACHER), "--train-data", str(file)]


def gradient_and_step(run: Run) -> list[dict[str, Tensor]]:
    """The gradient of the first step, and the second step: of the scale, and of everything else."""
    before, after = run.epoch(1), run.epoch(2)
    names = [name for name in before if not name.startswith("optimizer.")]
    # The optimizer numbers the parameters in this order.
    gradient = {name: before[f"optimizer.{i}.momentum_buffer"] for i, name in enumerate(names)}
    assert all(gradient[name].shape == before[name].shape for name in names)
    found = []
    for tensors in (gradient, {name: after[name] - before[name] for name in names}):
        scale = tensors.pop("logit_scale")
        found.append({"scale": scale, "towers": torch.cat([x.flatten() for x in tensors.values()])})
    return found


@pytest.mark.parametrize(
    ("several", "one"),
    [
        ("two processes", "one process"),
        pytest.param("static graph", "checkpointing", marks=pytest.mark.slow),
    ],
)
def test_processes_with_both_flags_train_as_one_does(ddp_runs: Runs, several: str, one: str) -> None:
    runs = ddp_runs[several], ddp_runs[one]
    assert [run.params["world_size"] for run in runs] == ["2", "1"]
    (gradient, step), (whole_gradient, whole_step) = map(gradient_and_step, runs)
    for part, whole in whole_gradient.items():
        assert relative_error(gradient[part], whole) < 1e-5
    assert relative_error(step["towers"], whole_step["towers"]) < 1e-4
    # Its own last digits, near 2.7.
    assert step["scale"].item() == pytest.approx(whole_step["scale"].item(), abs=2e-6)
    if several == "static graph":
        assert runs[0].params["ddp_static_graph"] == "True"
        assert list(runs[0].scalars["rank_lambda"].values()) == [0.0, 2.0]


@pytest.mark.slow
def test_columns_and_a_teacher_train_accumulated_on_processes_as_in_one(ddp_runs: Runs) -> None:
    several, one = ddp_runs["columns, accumulated"], ddp_runs["columns"]
    assert [run.params["world_size"] for run in (several, one)] == ["2", "1"]
    (gradient, _), (whole, _) = map(gradient_and_step, (several, one))
    assert relative_error(gradient["towers"], whole["towers"]) < 1e-5
    # The trainer's own: each of the two calls has the whole gradient of the scale.
    assert relative_error(gradient["scale"] / 2, whole["scale"]) < 1e-5
    assert several.scalars["pairs_with_partner"] == pytest.approx(one.scalars["pairs_with_partner"])
