"""The losses that the plug-in builds for the trainer, on real gloo processes, around each of open_clip's."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from torch import Tensor

from batches import random_batch
from collectives import Collectives
from process_pool import Pools
from rankloss import metrics, reference

N, D, SCALE = 24, 6, 10.0  # the whole batch, on however many processes
LENGTH, VOCABULARY = 3, 5  # of CoCa's captions
RANKCLIP = ["--loss", "rankclip", "--rankclip-schedule", "constant"]
RANKCLIP += ["--rankclip-lambda-cross", "3", "--rankclip-lambda-in", "2"]
RANK_WEIGHT = 3 / 16  # of the cross-modal term
DISTIL = ["--distill-model", "tiny", "--distill-pretrained", "file"]
Terms = dict[str, list[Tensor]]  # by the terms' names: value, and gradients of image, text and scale


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


CASES = [
    ("CoCaLoss", ["--model", "coca_tiny", "--coca-contrastive-loss-weight", "0.5"]),
    ("SigLipLoss", ["--siglip", "--loss-dist-impl", "gather"]),
    ("DistillClipLoss", [*DISTIL, "--rankclip-reference", "teacher"]),
    ("ClipLoss", [*DISTIL, "--loss", "rankclip-distill", "--rankclip-schedule", "constant"]),
]


@pytest.mark.parametrize(("base", "argv"), CASES)
def test_every_base_has_the_terms_of_one_process(pools: Pools, base: str, argv: list[str]) -> None:
    argv = [*argv, "--local-loss", "--gather-with-grad"]
    of_ranks, whole = pools[2].run(terms, base, argv), terms(0, 1, base, argv)
    assert {"contrastive_loss", "cross_modal_loss", "in_modal_loss"} <= whole.keys()
    for name, expected in whole.items():
        for a, e in zip(zip(*(of_rank[name] for of_rank in of_ranks), strict=True), expected, strict=True):
            torch.testing.assert_close(torch.stack(a).mean(0), e, rtol=1e-10, atol=1e-14)  # as DDP averages
    if base == "DistillClipLoss":
        given = {name: x.detach().numpy() for name, x in inputs(argv).items()}
        features = {name: given[name] for name in ("image_features", "text_features", "logit_scale")}
        teacher = {f"reference_{k}_features": given[f"dist_{k}_features"] for k in ("image", "text")}
        owed = RANK_WEIGHT * reference.cross_modal(**features, **teacher)
        assert whole["cross_modal_loss"][0].item() == pytest.approx(owed, rel=1e-10)


def agreement(rank: int, world_size: int, flags: list[str]) -> list[dict[str, float]]:
    """The agreement that three steps log; the first and the third measure it."""
    argv = ["--loss-agreement-every", "2", *flags]
    loss, outputs = built(rank, world_size, "ClipLoss", argv), share(inputs(argv), rank, world_size)
    steps = [loss(**outputs, output_dict=True) for _ in range(2)]
    with Collectives() as calls:
        steps.append(loss(**outputs, output_dict=True))
    assert calls.counts["allgather"] == 2, "each modality once, for the loss and the log"
    return [{name: x.item() for name, x in step.items() if name.endswith("tau")} for step in steps]


@pytest.mark.parametrize("flags", [[], ["--local-loss", "--gather-with-grad"]])
def test_every_process_logs_the_agreement_of_the_whole_batch(pools: Pools, flags: list[str]) -> None:
    batch = random_batch(0, N, D, SCALE).leaves(torch.float64)
    whole = metrics.rank_agreement(*batch[:2])
    expected = {name: whole[name].item() for name in ("cross_modal_tau", "in_modal_tau")}
    for steps in pools[2].run(agreement, flags):
        assert steps == [pytest.approx(expected, abs=1e-6)] * 3
