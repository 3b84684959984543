"""The features of the trainer, each in a real run with ``--loss rankclip``."""

from __future__ import annotations

import math
import re

import cpu_ddp
import open_clip.loss
import pytest
import torch
from torch import nn
from trainer_runs import (
    LOCKS_TEXT,
    OFFICIAL,
    PRECISIONS,
    SAMPLES,
    STEPS,
    TORCHRUN,
    Run,
    Runs,
    Trainer,
    assert_equal_training,
)

import rankloss
from rankloss import reference, schedules
from rankloss_open_clip.logged_terms import TrainerLoss
from rankloss_trainers.clock import Position

NEEDS_TEXT_LOCK = pytest.mark.skipif(
    not LOCKS_TEXT, reason="this open_clip locks the text towers of Hugging Face models only"
)
RANK_TERMS = ("Cross_modal_loss", "In_modal_loss")


def assert_trains(run: Run, steps: int = 2 * STEPS) -> list[dict[str, float]]:
    """Every step of two epochs has finite values, terms that are not zero, and the schedule's λ."""
    lines = run.train_lines()
    assert len(lines) == steps
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert all(line[term] > 0 for term in (*RANK_TERMS, "Contrastive_loss"))
        assert line["Rank_lambda"] == schedules.rankclip(1, 2) == schedules.rankclip(2, 2)
    tensors = run.epoch(2)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    return lines


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains(runs: Runs, precision: str) -> None:
    lines = assert_trains(runs[precision])
    exact = runs["fp32"].train_lines()[0]
    # The first step has the same weights and pairs; eight bits of mantissa give two digits.
    assert lines[0] == pytest.approx(exact, rel=1e-6 if precision == "fp32" else 0.02)


def test_precisions_are_those_that_were_asked_for(runs: Runs) -> None:
    dtypes = {precision: runs[precision].epoch(1)["visual.conv1.weight"].dtype for precision in PRECISIONS}
    half = torch.bfloat16
    assert dtypes == dict.fromkeys(PRECISIONS, torch.float32) | {"bf16": half, "pure_bf16": half}
    first = [tuple(runs[precision].train_lines()[0].values()) for precision in PRECISIONS]
    assert len(set(first)) == len(PRECISIONS)


def test_order_under_bf16_is_that_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(2, 64, 16, generator=generator), dim=-1).bfloat16()
    loss = TrainerLoss(
        rankloss.RankClipLoss(open_clip.loss.ClipLoss(), schedule="constant", normalizer=1.0),
        unit="epoch",
        sums_every_value=True,
    )
    loss.start_epoch(Position(epoch=0, epochs=2, steps=1, accum_freq=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(rows[0], rows[1], torch.tensor(100.0), output_dict=True)
        logits = 100 * rows[0] @ rows[1].T
    images, texts = rows.double().numpy()
    for name, oracle in (("cross_modal_loss", reference.cross_modal), ("in_modal_loss", reference.in_modal)):
        assert terms[name].item() == pytest.approx(oracle(images, texts, 100.0), rel=1e-5)
    # The trainer's own logits do tie here, so the comparison above can fail.
    assert sum(len(keys.unique()) < len(keys) for keys in logits) > len(logits) / 2


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("siglip", "SigLipLoss"),
        ("coca", "CoCaLoss"),
        ("distill", "DistillClipLoss"),
        ("lock image", "ClipLoss"),
    ],
)
def test_every_loss_of_the_trainer_trains_with_the_terms(runs: Runs, name: str, base: str) -> None:
    run = runs[name]
    assert f"on {base}, schedule rankclip per epoch over 2" in run.log
    lines = assert_trains(run)
    own = {"coca": {"Caption_loss"}, "distill": {"Distill_loss"}}.get(name, set())
    assert lines[0].keys() >= own
    assert all(line[term] > 0 for line in lines for term in own)


def test_distillation_ranks_the_student_alone(runs: Runs) -> None:
    first, alone = runs["distill"].train_lines()[0], runs["fp32"].train_lines()[0]
    assert [first[term] for term in RANK_TERMS] == [alone[term] for term in RANK_TERMS]
    assert first["Loss"] == pytest.approx(alone["Loss"] + first["Distill_loss"], rel=1e-4)


def test_lists_are_ranked_by_the_teacher_that_the_trainer_distils_from(runs: Runs) -> None:
    run = runs["ranked by the teacher"]
    assert "on DistillClipLoss, schedule rankclip per epoch over 2" in run.log
    assert "ranked by the teacher" in run.log
    (first, *_), own = assert_trains(run), runs["distill"].train_lines()[0]
    assert first["Distill_loss"] == own["Distill_loss"]
    assert all(abs(first[term] / own[term] - 1) > 1e-3 for term in RANK_TERMS)


def test_teacher_can_rank_without_the_trainers_distillation(runs: Runs) -> None:
    run, beside = runs["ranked by the teacher alone"], runs["ranked by the teacher"].train_lines()[0]
    assert "on ClipLoss, schedule rankclip per epoch over 2" in run.log
    assert "ranked by the teacher" in run.log
    first, *_ = assert_trains(run)
    assert "Distill_loss" not in first
    assert [first[term] for term in RANK_TERMS] == pytest.approx(
        [beside[term] for term in RANK_TERMS], rel=1e-4
    )
    assert first["Loss"] == pytest.approx(beside["Loss"] - beside["Distill_loss"], rel=1e-4)


def test_preset_ranks_by_the_eight_best_of_the_teacher(runs: Runs) -> None:
    run = runs["rankclip-distill"]
    assert "Loss: rankclip-distill (rankloss" in run.log
    assert "lambda scale 64 cross-modal and 64 in-modal" in run.log
    assert "lists row, best 8 of each, ranked by the teacher" in run.log
    (first, *_), whole = assert_trains(run), runs["ranked by the teacher alone"].train_lines()[0]
    assert first["Contrastive_loss"] == pytest.approx(whole["Contrastive_loss"], rel=1e-4)
    assert "Distill_loss" not in first
    for term in RANK_TERMS:
        raw = term.replace("_loss", "_raw")
        assert first[term] == pytest.approx(schedules.rankclip(1, 2) * 64 / 16 * first[raw], rel=1e-3)
        assert abs(first[raw] / whole[raw] - 1) > 1e-2


@pytest.mark.parametrize(
    ("name", "locked"),
    [("lock image", "image"), pytest.param("lock text", "text", marks=NEEDS_TEXT_LOCK)],
)
def test_locked_tower_stays_and_the_other_learns(runs: Runs, name: str, locked: str) -> None:
    assert_trains(runs[name])
    before, after = runs[name].epoch(1), runs[name].epoch(2)
    towers: dict[str, list[bool]] = {"image": [], "text": []}
    for key in before:
        if not key.startswith(("optimizer.", "logit_scale")):
            towers["image" if key.startswith("visual.") else "text"].append(
                torch.equal(before[key], after[key])
            )
    other = {"image": "text", "text": "image"}[locked]
    assert len(towers[locked]) > 10
    assert all(towers[locked])
    assert not any(towers[other])


def test_grad_checkpointing_changes_no_bit(runs: Runs) -> None:
    assert runs["grad checkpointing"].params["grad_checkpointing"] == "True"
    assert_equal_training(runs["fp32"], runs["grad checkpointing"], epochs=(1, 2))


def test_lambda_moves_without_the_learning_rate_schedule(runs: Runs) -> None:
    scalars = runs["skip scheduler"].scalars
    assert len(set(scalars["lr"].values())) == 1
    assert len(set(runs["--loss rankclip"].scalars["lr"].values())) > STEPS
    assert scalars["rank_lambda"] == runs["--loss rankclip"].scalars["rank_lambda"]


def test_csv_and_webdataset_train_on_the_same_pairs(runs: Runs) -> None:
    csv, webdataset = runs["csv, whole set"], runs["webdataset, whole set"]
    # One batch of the whole set, uncropped: each loader only chooses the order of the sum.
    for one, other in zip(assert_trains(csv, steps=2), assert_trains(webdataset, steps=2), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_validation_loss_stays_plain_clip(runs: Runs) -> None:
    run = runs["csv, whole set"]
    # Validated on the pairs it trains on: an epoch ends with what the only step of the next one starts from.
    after_the_first, _ = map(float, re.findall(r"clip_val_loss: ([\d.]+)", run.log))
    line = run.train_lines()[1]
    assert after_the_first == pytest.approx(line["Contrastive_loss"], rel=1e-4)
    assert line["Loss"] > 1.01 * after_the_first


def test_synthetic_data_ties_every_key(runs: Runs) -> None:
    # One picture and one caption: all permutations of a list are equally likely, so each item costs log N.
    expected = schedules.rankclip(1, 2) / 16 * math.log(SAMPLES // STEPS)
    for line in assert_trains(runs["synthetic"]):
        assert [line[term] for term in RANK_TERMS] == pytest.approx([expected] * 2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "siglip",
        "coca with accumulation",
        "distill",
        "amp_bf16 with accumulation",
        "pure_bf16",
        "two processes, both flags",
        "two processes, neither flag",
    ],
)
def test_epoch_at_lambda_zero_is_bit_equal_to_stock_with_every_feature(trainer: Trainer, name: str) -> None:
    tiny = f"local-dir:{trainer.directory / 'tiny'}"
    options = {
        "siglip": ["--siglip"],
        "coca with accumulation": ["--model", f"{tiny}-coca", "--accum-freq", "2"],
        "distill": ["--distill-model", tiny, "--distill-pretrained", "none"],
        "amp_bf16 with accumulation": ["--precision", "amp_bf16", "--accum-freq", "2"],
        "pure_bf16": ["--precision", "pure_bf16"],
        "two processes, both flags": ["--local-loss", "--gather-with-grad"],
        "two processes, neither flag": [],
    }[name]

    def train(how: str, *loss: str) -> Run:
        given = (f"lambda zero, {name}, {how}", "--epochs", "2", *options, *loss)
        processes = name.startswith("two")
        run = (
            trainer.run(*given, command=(*TORCHRUN, "2", "--", cpu_ddp.__file__))
            if processes
            else trainer.call(*given)
        )
        assert run.returncode == 0, run.output[-4000:]
        return run

    stock, run = train("stock"), train("rankclip", *OFFICIAL)
    assert_equal_training(stock, run, epochs=(1,))
    assert not torch.equal(stock.epoch(2)["visual.proj"], run.epoch(2)["visual.proj"]), "λ is 2 there"


@pytest.mark.slow
def test_compiled_model_trains_the_same(trainer: Trainer, runs: Runs) -> None:
    run = trainer.run("compiled", "--epochs", "2", "--loss", "rankclip", "--torchcompile")
    assert run.returncode == 0, run.output[-4000:]
    assert "Compiling model" in run.log
    for line, eager in zip(assert_trains(run), runs["fp32"].train_lines(), strict=True):
        assert line == pytest.approx(eager, rel=1e-3)
