"""The losses that the plug-in builds for the trainer, on real gloo processes, around each of open_clip's."""

from __future__ import annotations

import itertools
import logging

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from torch import Tensor

import one_process
import rankloss
from batches import random_batch, relative_error
from collectives import Collectives
from process_pool import Pool, Pools
from rankloss import reference
from rankloss_trainers.clock import Position

N, D, SCALE = 24, 6, 10.0  # the whole batch, on however many processes
LENGTH, VOCABULARY = 3, 5  # of CoCa's captions
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
RANK_TERMS = ["cross_modal_loss", "in_modal_loss"]
RANKCLIP = ["--loss", "rankclip", "--rankclip-schedule", "constant"]
RANKCLIP += ["--rankclip-lambda-cross", "3", "--rankclip-lambda-in", "2"]
WEIGHTS = {"cross_modal_loss": 3 / 16, "in_modal_loss": 2 / 16}  # λ of the rank terms
COCA_WEIGHT = 0.5
BASES = {
    "ClipLoss": [],
    "CoCaLoss": ["--model", "coca_tiny", "--coca-contrastive-loss-weight", str(COCA_WEIGHT)],
    "DistillClipLoss": ["--distill-model", "tiny", "--distill-pretrained", "file"],
    "SigLipLoss": ["--siglip"],
}
DIST_IMPLS = ["bidir", "shift", "reduce", "gather"]

Terms = dict[str, list[Tensor]]  # by the terms' names: value, and gradients of image, text and scale


def options(local_loss: bool, gather_with_grad: bool) -> list[str]:
    return ["--local-loss"] * local_loss + ["--gather-with-grad"] * gather_with_grad


def built(rank: int, world_size: int, base: str, argv: list[str]) -> torch.nn.Module:
    """The loss as the trainer builds it."""
    loss_options = [] if "--loss" in argv else RANKCLIP
    args = parse_args([*loss_options, *BASES[base], *argv])
    args.rank, args.world_size, args.distill = rank, world_size, args.distill_model is not None
    loss = open_clip.create_loss(args)
    assert type(loss.criterion.base).__name__ == base
    loss.start_epoch(Position(epoch=0, epochs=args.epochs, steps=1, accum_freq=args.accum_freq))
    return loss


def inputs(base: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model puts out for the whole batch."""
    v, t, s = random_batch(0, N, D, SCALE).leaves(dtype)
    outputs = {"image_features": v, "text_features": t, "logit_scale": s}
    generator = torch.Generator().manual_seed(0)
    if base == "CoCaLoss":
        outputs["logits"] = torch.randn(N, LENGTH, VOCABULARY, generator=generator, dtype=dtype)
        outputs["labels"] = torch.randint(1, VOCABULARY, (N, LENGTH), generator=generator)
    if base == "DistillClipLoss":
        teacher = (x.detach() for x in random_batch(1, N, D, SCALE / 2).leaves(dtype))
        names = ("dist_image_features", "dist_text_features", "dist_logit_scale")
        outputs.update(zip(names, teacher, strict=True))
    if base == "SigLipLoss":
        outputs["logit_bias"] = torch.tensor(-3.0, dtype=dtype)
    return outputs


def terms(
    rank: int, world_size: int, base: str, argv: list[str], dtype: torch.dtype = torch.float64
) -> tuple[Terms, float]:
    """What this rank trains and logs, and its λ."""
    outputs = inputs(base, dtype)
    shares = {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in outputs.items()}
    entries = built(rank, world_size, base, argv)(**shares, output_dict=True)
    losses = {name: value for name, value in entries.items() if name.endswith("_loss")}
    rank_lambda = entries["rank_lambda"].item()
    by = (outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
    return {name: [value.detach(), *_gradients(value, by)] for name, value in losses.items()}, rank_lambda


def _gradients(value: Tensor, by: tuple[Tensor, ...]) -> list[Tensor]:
    if not value.requires_grad:  # logged only, or a caption loss, of logits that are constants here
        return [torch.zeros_like(x) for x in by]
    return list(torch.autograd.grad(value, by, retain_graph=True))


def averaged(results: list[tuple[Terms, float]]) -> Terms:
    """The ranks' terms as DDP averages them."""
    names = results[0][0].keys()
    assert all(of_rank.keys() == names and rank_lambda == 1.0 for of_rank, rank_lambda in results)
    return {
        name: [torch.stack(x).mean(0) for x in zip(*(of_rank[name] for of_rank, _ in results), strict=True)]
        for name in names
    }


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance or a.norm() == e.norm() == 0


@pytest.mark.parametrize("base", ["ClipLoss", "CoCaLoss", "DistillClipLoss"])
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_terms_follow_the_flags_as_clip_loss_does(
    pool: Pool, base: str, local_loss: bool, gather_with_grad: bool
) -> None:
    argv = options(local_loss, gather_with_grad)
    actual = averaged(pool.run(terms, base, argv))
    whole, _ = terms(0, 1, base, argv)
    assert actual.keys() == whole.keys()
    share = 1 if gather_with_grad else pool.world_size
    for name, (value, dv, dt, ds) in whole.items():
        assert_equal([actual[name][0], actual[name][3]], [value, ds])
        if gather_with_grad or not local_loss:
            assert_equal(actual[name], [value, dv / share, dt / share, ds])
    # local_loss alone has a gradient of its own, which one process can compute.
    batch = random_batch(0, N, D, SCALE).leaves()
    weights = {**WEIGHTS, "contrastive_loss": COCA_WEIGHT if base == "CoCaLoss" else 1.0}
    for name, loss in (
        ("contrastive_loss", one_process.clip),
        ("cross_modal_loss", one_process.cross),
        ("in_modal_loss", one_process.in_),
    ):
        value = weights[name] * one_process.mean_loss(
            loss, batch, pool.world_size, local_loss, gather_with_grad
        )
        assert_equal(actual[name], [value, *torch.autograd.grad(value, batch)])


@pytest.mark.parametrize("dist_impl", DIST_IMPLS)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_beside_siglip_the_rank_terms_are_exact_whatever_the_flags(
    pool: Pool, local_loss: bool, gather_with_grad: bool, dist_impl: str
) -> None:
    argv = [*options(local_loss, gather_with_grad), "--loss-dist-impl", dist_impl]
    actual = averaged(pool.run(terms, "SigLipLoss", argv))
    whole, _ = terms(0, 1, "SigLipLoss", argv)
    assert {"contrastive_loss", *RANK_TERMS} <= whole.keys() == actual.keys()
    for name in whole:
        assert_equal(actual[name], whole[name])


def test_batch_lists_beside_siglip_are_exact(pool: Pool) -> None:
    argv = ["--rankclip-lists", "batch"]
    actual, (whole, _) = averaged(pool.run(terms, "SigLipLoss", argv)), terms(0, 1, "SigLipLoss", argv)
    for name in whole:
        assert_equal(actual[name], whole[name])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_values_in_float32_are_the_single_process_ones(
    pool: Pool, base: str, local_loss: bool, gather_with_grad: bool
) -> None:
    argv = options(local_loss, gather_with_grad)
    actual = averaged(pool.run(terms, base, argv, torch.float32))
    whole, _ = terms(0, 1, base, argv, torch.float32)
    for name, (value, *_) in whole.items():
        assert relative_error(actual[name][0], value) < 1e-6


def accumulated(rank: int, world_size: int, base: str, argv: list[str], micro_batches: int) -> list[Tensor]:
    """Gradients of image, text and scale as the trainer accumulates them over micro-batches."""
    outputs = inputs(base, torch.float64)
    shares = {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in outputs.items()}
    loss = built(rank, world_size, base, [*argv, "--accum-freq", str(micro_batches)])
    by = [outputs[name] for name in ("image_features", "text_features", "logit_scale")]
    for j in range(micro_batches):
        # Everything but the scalars comes in pieces, one of which has a graph.
        mixed = {
            name: torch.cat([c if i == j else c.detach() for i, c in enumerate(x.chunk(micro_batches))])
            if x.dim()
            else x
            for name, x in shares.items()
        }
        sum(loss(**mixed, output_dict=True).values()).backward()
    return [x.grad for x in by]


@pytest.mark.parametrize("base", ["ClipLoss", "CoCaLoss", "SigLipLoss"])  # the trainer refuses distillation
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_accumulation_gives_towers_the_big_batch_and_the_scale_k_times(
    pools: Pools, base: str, world_size: int
) -> None:
    def gradients(micro_batches: int) -> list[Tensor]:
        if world_size == 1:
            return accumulated(0, 1, base, options(True, True), micro_batches)
        results = pools[world_size].run(accumulated, base, options(True, True), micro_batches)
        return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]

    dv, dt, ds = gradients(1)
    for micro_batches in (2, 3):
        assert_equal(gradients(micro_batches), [dv, dt, micro_batches * ds])


def calls_of_a_step(rank: int, world_size: int, argv: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    outputs = inputs("ClipLoss", torch.float64)
    shares = {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in outputs.items()}
    loss = built(rank, world_size, "ClipLoss", argv)
    loss(**shares, output_dict=True)  # the first compares what the processes bring
    with Collectives() as forward:
        total = sum(loss(**shares, output_dict=True).values())
    with Collectives() as backward:
        total.backward()
    return dict(forward.counts), dict(backward.counts)


# With λ > 0; with λ = 0, where the raw terms are only logged; and where the agreement is measured as well.
STEPS = {
    "lambda": ["--rankclip-schedule", "constant"],
    "no lambda yet": ["--rankclip-schedule", "official"],
    "agreement": ["--rankclip-agreement-every", "1"],
    "agreement alone": [
        *("--rankclip-lambda-cross", "0", "--rankclip-lambda-in", "0", "--rankclip-agreement-every", "1")
    ],
    "cyclip": ["--loss", "cyclip"],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_step_with_clips_own_loss_gathers_each_modality_once(
    pool: Pool, local_loss: bool, gather_with_grad: bool, step: str
) -> None:
    argv = [*options(local_loss, gather_with_grad), *STEPS[step]]
    for forward, backward in pool.run(calls_of_a_step, argv):
        assert forward == {"allgather": 2}
        assert backward == ({"allreduce": 2} if gather_with_grad else {})


def warnings(rank: int, world_size: int, base: str, argv: list[str]) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        terms(rank, world_size, base, argv)
    finally:
        logging.getLogger().removeHandler(handler)
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_local_loss_without_gather_with_grad_is_warned_of_once(
    pool: Pool, base: str, local_loss: bool, gather_with_grad: bool
) -> None:
    first, *others = pool.run(warnings, base, options(local_loss, gather_with_grad))
    assert others == [[]] * (pool.world_size - 1)
    if local_loss and not gather_with_grad and base != "SigLipLoss":
        assert len(first) == 1
        assert "local_loss without gather_with_grad" in first[0]
    else:
        assert first == []


TEACHER = ["--rankclip-reference", "teacher"]
PRESET = ["--loss", "rankclip-distill", "--rankclip-schedule", "constant"]
PRESET_WEIGHTS = dict.fromkeys(RANK_TERMS, 64 / 16)
RANKED_BY_THE_TEACHER = {
    "beside its distillation": ("DistillClipLoss", [*RANKCLIP, *TEACHER], WEIGHTS, {}),
    "alone": ("ClipLoss", [*RANKCLIP, *TEACHER, "--rankclip-distill-loss", "exclude"], WEIGHTS, {}),
    "preset": ("ClipLoss", PRESET, PRESET_WEIGHTS, {"top_k": 8}),
    "preset with distillation": (
        "DistillClipLoss",
        [*PRESET, "--rankclip-distill-loss", "include"],
        PRESET_WEIGHTS,
        {"top_k": 8},
    ),
    "preset of a sigmoid loss": ("SigLipLoss", [*PRESET, "--siglip"], PRESET_WEIGHTS, {"top_k": 8}),
}


def ranked_by_the_teacher(rank: int, world_size: int, name: str) -> Terms:
    base, argv, *_ = RANKED_BY_THE_TEACHER[name]
    args = parse_args([*argv, *BASES["DistillClipLoss"], *options(True, True)])
    args.rank, args.world_size, args.distill = rank, world_size, True
    loss = open_clip.create_loss(args)
    assert type(loss.criterion.base).__name__ == base
    loss.start_epoch(Position(epoch=0, epochs=args.epochs, steps=1, accum_freq=1))
    whole = inputs("DistillClipLoss", torch.float64)
    if base == "SigLipLoss":
        whole["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)
    own = {k: x.chunk(world_size)[rank] if x.dim() else x for k, x in whole.items()}
    by = (whole["image_features"], whole["text_features"], whole["logit_scale"])
    entries = loss(**own, output_dict=True)
    losses = {key: value for key, value in entries.items() if key.endswith("_loss")}
    return {key: [value.detach(), *_gradients(value, by)] for key, value in losses.items()}


@pytest.mark.parametrize("name", RANKED_BY_THE_TEACHER)
def test_teachers_features_reach_the_rank_terms_from_every_process(pools: Pools, name: str) -> None:
    base, _, weights, rank_options = RANKED_BY_THE_TEACHER[name]
    whole = inputs("DistillClipLoss", torch.float64)
    teacher = {f"reference_{k}_features": whole.pop(f"dist_{k}_features") for k in ("image", "text")}
    del whole["dist_logit_scale"]
    by = tuple(whole.values())
    results = pools[2].run(ranked_by_the_teacher, name)
    found = {
        key: [torch.stack(x).mean(0) for x in zip(*(r[key] for r in results), strict=True)]
        for key in results[0]
    }
    assert ("distill_loss" in found) is (base == "DistillClipLoss")
    criterion = rankloss.RankConsistency(
        **{k.removesuffix("_loss"): w for k, w in weights.items()}, **rank_options, gather=False
    )
    expected, own = criterion(**whole, **teacher, output_dict=True), criterion(**whole, output_dict=True)
    of_base = rankloss.SigLipLoss if base == "SigLipLoss" else rankloss.ClipLoss
    bias = {"logit_bias": -3.0} if base == "SigLipLoss" else {}
    expected["contrastive_loss"] = of_base(gather=False)(**whole, **bias)
    arrays = {k: x.detach().numpy() for k, x in {**whole, **teacher}.items()}
    for term, oracle in zip(RANK_TERMS, (reference.cross_modal, reference.in_modal), strict=True):
        value = weights[term] * oracle(**arrays, **rank_options)
        assert expected[term].item() == pytest.approx(value, rel=1e-10)
        assert relative_error(own[term], expected[term]) > 1e-2
    for key, value in expected.items():
        assert_equal(found[key], [value.detach(), *_gradients(value, by)])
