"""The losses that the plug-in builds for the trainer, on real gloo processes, around each of open_clip's."""

from __future__ import annotations

import itertools

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from torch import Tensor

import one_process
from batches import random_batch, relative_error
from collectives import Collectives
from process_pool import Pools
from rankloss import metrics, reference

N, D, SCALE = 24, 6, 10.0  # the whole batch, on however many processes
LENGTH, VOCABULARY = 3, 5  # of CoCa's captions
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
RANKCLIP = ["--loss", "rankclip", "--rankclip-schedule", "constant"]
RANKCLIP += ["--rankclip-lambda-cross", "3", "--rankclip-lambda-in", "2"]
WEIGHTS = {"cross_modal_loss": 3 / 16, "in_modal_loss": 2 / 16}  # λ of the rank terms
COCA_WEIGHT = 0.5
DISTIL = ["--distill-model", "tiny", "--distill-pretrained", "file"]
BASES = {
    "ClipLoss": [],
    "CoCaLoss": ["--model", "coca_tiny", "--coca-contrastive-loss-weight", str(COCA_WEIGHT)],
    "DistillClipLoss": DISTIL,
    "SigLipLoss": ["--siglip"],
}

Terms = dict[str, list[Tensor]]  # by the terms' names: value, and gradients of image, text and scale


def options(local_loss: bool, gather_with_grad: bool) -> list[str]:
    return ["--local-loss"] * local_loss + ["--gather-with-grad"] * gather_with_grad


def built(rank: int, world_size: int, base: str, argv: list[str]) -> torch.nn.Module:
    """The loss as the trainer builds it."""
    args = parse_args([*([] if "--loss" in argv else RANKCLIP), *argv])
    args.rank, args.world_size, args.distill = rank, world_size, args.distill_model is not None
    loss = open_clip.create_loss(args)
    assert type(loss.criterion.base).__name__ == base
    loss.start_epoch(0, args.epochs, 1, args.accum_freq)
    return loss


def inputs(argv: list[str]) -> dict[str, Tensor]:
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
    outputs = inputs(argv)
    entries = built(rank, world_size, base, argv)(**share(outputs, rank, world_size), output_dict=True)
    assert entries["rank_lambda"].item() == 1
    by = (outputs["image_features"], outputs["text_features"], outputs["logit_scale"])

    def gradients(value: Tensor) -> list[Tensor]:
        if not value.requires_grad:  # a caption loss, of logits that are constants here
            return [torch.zeros_like(x) for x in by]
        return list(torch.autograd.grad(value, by, retain_graph=True))

    return {k: [x.detach(), *gradients(x)] for k, x in entries.items() if k.endswith("_loss")}


def averaged(results: list[Terms]) -> Terms:
    """The ranks' terms as DDP averages them."""
    return {
        name: [torch.stack(x).mean(0) for x in zip(*(of_rank[name] for of_rank in results), strict=True)]
        for name in results[0]
    }


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-10 or a.norm() == e.norm() == 0


@pytest.mark.parametrize(("base", "world_size"), [("CoCaLoss", 2), ("DistillClipLoss", 3)])
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_terms_follow_the_flags_as_clip_loss_does(
    pools: Pools, base: str, world_size: int, local_loss: bool, gather_with_grad: bool
) -> None:
    argv = [*BASES[base], *options(local_loss, gather_with_grad)]
    actual, whole = averaged(pools[world_size].run(terms, base, argv)), terms(0, 1, base, argv)
    assert actual.keys() == whole.keys()
    part = 1 if gather_with_grad else world_size
    for name, (value, dv, dt, ds) in whole.items():
        assert_equal([actual[name][0], actual[name][3]], [value, ds])
        if gather_with_grad or not local_loss:
            assert_equal(actual[name], [value, dv / part, dt / part, ds])
    # local_loss alone has a gradient of its own, which one process can compute.
    batch = random_batch(0, N, D, SCALE).leaves()
    weights = {**WEIGHTS, "contrastive_loss": COCA_WEIGHT if base == "CoCaLoss" else 1.0}
    for name, loss in (
        ("contrastive_loss", one_process.clip),
        ("cross_modal_loss", one_process.cross),
        ("in_modal_loss", one_process.in_),
    ):
        mean = one_process.mean_loss(loss, batch, world_size, local_loss, gather_with_grad)
        value = weights[name] * mean
        assert_equal(actual[name], [value, *torch.autograd.grad(value, batch)])


@pytest.mark.parametrize(
    "argv",
    [
        ["--loss-dist-impl", "gather", "--local-loss"],
    ],
    ids=" ".join,
)
def test_beside_siglip_the_rank_terms_are_exact_whatever_the_flags(pools: Pools, argv: list[str]) -> None:
    argv = ["--siglip", *argv]
    actual, whole = averaged(pools[3].run(terms, "SigLipLoss", argv)), terms(0, 1, "SigLipLoss", argv)
    assert {"contrastive_loss", *WEIGHTS} <= whole.keys() == actual.keys()
    for name in whole:
        assert_equal(actual[name], whole[name])


def agreement(rank: int, world_size: int, flags: tuple[bool, bool]) -> list[dict[str, float]]:
    """The agreement that three steps log; the first and the third measure it."""
    argv = ["--rankclip-agreement-every", "2", *options(*flags)]
    loss, outputs = built(rank, world_size, "ClipLoss", argv), share(inputs(argv), rank, world_size)
    steps = [loss(**outputs, output_dict=True) for _ in range(2)]
    with Collectives() as calls:
        steps.append(loss(**outputs, output_dict=True))
    assert calls.counts["allgather"] == 2, "each modality once, for the loss and the log"
    return [{name: x.item() for name, x in step.items() if name.endswith("tau")} for step in steps]


@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[3]])
def test_every_process_logs_the_agreement_of_the_whole_batch(pools: Pools, flags: tuple[bool, bool]) -> None:
    batch = random_batch(0, N, D, SCALE).leaves(torch.float64)
    whole = metrics.rank_agreement(*batch[:2])
    expected = {name: whole[name].item() for name in ("cross_modal_tau", "in_modal_tau")}
    for steps in pools[2].run(agreement, flags):
        assert steps == [pytest.approx(expected, abs=1e-6)] * 3


BY_TEACHER = [*DISTIL, *options(True, True), "--rankclip-reference", "teacher"]
PRESET = [*DISTIL, *options(True, True), "--loss", "rankclip-distill", "--rankclip-schedule", "constant"]


@pytest.mark.parametrize(
    ("base", "argv"),
    [
        ("DistillClipLoss", BY_TEACHER),
        ("ClipLoss", PRESET),
        ("SigLipLoss", [*PRESET, "--siglip"]),
    ],
)
def test_teachers_features_reach_the_rank_terms_from_every_process(
    pools: Pools, base: str, argv: list[str]
) -> None:
    found, whole = averaged(pools[2].run(terms, base, argv)), terms(0, 1, base, argv)
    assert ("distill_loss" in found) is (base == "DistillClipLoss")
    for name in whole:
        assert_equal(found[name], whole[name])
    given = {name: x.detach().numpy() for name, x in inputs(argv).items()}
    features = {name: given[name] for name in ("image_features", "text_features", "logit_scale")}
    teacher = {f"reference_{k}_features": given[f"dist_{k}_features"] for k in ("image", "text")}
    weight, top_k = (64 / 16, 8) if "rankclip-distill" in argv else (WEIGHTS["cross_modal_loss"], None)
    expected = weight * reference.cross_modal(**features, **teacher, top_k=top_k)
    assert whole["cross_modal_loss"][0].item() == pytest.approx(expected, rel=1e-10)
