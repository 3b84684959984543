"""Every study: its report follows from its records, its small size is trained to its end."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from studies import STUDIES, runner
from studies.finetuning import task as finetuning_task
from studies.finetuning.study import FineTuning
from studies.finetuning.train import Setting as FineTuningSetting
from studies.miniature import ladder
from studies.miniature.settings import PLANS, PRESETS, Attempt
from studies.miniature.trainings import Miniature
from studies.photographs import (
    drawings,
    features,
    heads,
    student_losses,
    teacher,
    train,
    view_losses,
    views,
)
from studies.photographs.features import Side
from studies.photographs.taught import Taught
from studies.runner import Run, load
from torch.nn.functional import normalize


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_that_of_its_records(name, tmp_path):
    """Byte for byte, and pictures of the same size, whose pixels depend on versions.

    A study without a report is one whose trainings are not all there.
    """
    study = load(name)
    copy = tmp_path / study.folder.name
    shutil.copytree(study.folder, copy, ignore=shutil.ignore_patterns("report", "*.py", "__pycache__"))
    run = Run(dataclasses.replace(study, folder=copy), "full", tmp_path)
    if not (study.folder / "report" / f"{study.report}.md").is_file():
        with pytest.raises(RuntimeError, match="nothing"):
            run.write()
        return
    written = run.write()
    committed = study.folder / "report" / written.name
    assert written.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
    for picture in written.parent.rglob("*.png"):
        there = committed.parent / picture.relative_to(written.parent)
        with Image.open(picture) as new, Image.open(there) as old:
            assert new.size == old.size


class Encoders:
    """Encoders that need no weights."""

    name = "made up"

    def pictures(self, pictures):
        """Return a picture's pixels, averaged."""
        small = [np.asarray(one.convert("RGB").resize((8, 8)), dtype=np.float32).ravel() for one in pictures]
        return np.stack(small) / 255

    def sentences(self, sentences):
        """Return numbers drawn by a sentence's hash."""
        seeds = (int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in sentences)
        return np.stack([np.random.default_rng(seed).normal(size=12).astype(np.float32) for seed in seeds])


class Unused(Encoders):
    """Encoders whose features are all there."""

    def __init__(self):
        raise AssertionError("features are computed again")


def test_a_small_study_is_trained_and_reported_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "FrozenEncoders", Encoders)
    arguments = ["lists", "--output", str(tmp_path)]
    assert runner.main([*arguments, "--report-only"]) == 1
    assert "nothing to report" in capsys.readouterr().out
    assert runner.main(arguments) == 0
    (report,) = (tmp_path / "quick").glob("*/report/*.md")
    text = report.read_text(encoding="utf-8")
    assert "smoke test" in text
    assert "Nothing is concluded from fewer than 3 seeds" in text
    trained = {path: path.read_bytes() for path in tmp_path.rglob("records.jsonl")}
    assert trained
    assert runner.main(arguments) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("records.jsonl")} == trained


@pytest.mark.parametrize("arm", [*student_losses.ARMS, student_losses.PER_STEP])
def test_a_student_of_each_kind(arm, icons, tmp_path):
    """On icons as part 2c has them; the features are kept."""
    sides = drawings.icons(icons, 60, 20)
    data = drawings.data_set(sides, tmp_path, Encoders)
    again = drawings.data_set(sides, tmp_path, Unused)
    assert again.fingerprint == data.fingerprint
    sizes = {"epochs": 2, "batch_size": 20, "train_pictures": 60}
    found = data.train(train.Setting(arm, 0, "dev", **sizes, weight=1.0, top_k=4, scale=10.0))
    assert found["metrics"].keys() == {"retrieval", "geometry"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": "mimicry", "weight": 8.0}, {"loss": "rankclip-distill", "weight": 8.0}, {"share": 0.5}],
)
def test_a_fine_tuning_of_each_kind(changes, icons, tmp_path):
    pairs = finetuning_task.read(icons, pretrained=256, held_out=20, emojis=400)
    data = FineTuning(pairs, tmp_path)
    found = data.train(FineTuningSetting("any", 0, "choice", 1, 1, 1e-3, **changes))
    assert {*found["metrics"]} == {"kept", "learned", "mean"}
    assert [*tmp_path.iterdir()] == [tmp_path / f"{data.fingerprint}-1-seed0.pt"]


def side(n, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures, sentences = torch.randn(n, 16, generator=generator), torch.randn(n, 5, 12, generator=generator)
    return Side(pictures, sentences)


ARMS = [
    (one["view"], one["loss"])
    for name in ("photographs-2b", "photographs-3")
    for one in load(name).sizes("quick").arms.values()
]


@pytest.mark.parametrize(("view", "loss"), ARMS)
def test_a_heads_training_of_each_kind(view, loss):
    train = side(60, 0)
    common = normalize(torch.randn(60, 300, generator=torch.Generator().manual_seed(1)), dim=-1)
    sentences = normalize(common[:, None] + 0.1 * torch.randn(60, 5, 300), dim=-1)
    seen, weak = Side(common, sentences), Side(common[:, :9], sentences[..., :9])
    taught = Taught.__new__(Taught)
    taught.of = argparse.Namespace(sides={"train": train})
    taught.teacher = teacher.Teacher({"train": seen}, **teacher.lists(seen, weak))
    sizes = {"epochs": 2, "batch_size": 20, "train_pictures": 60}
    own = {"weight": 1.0, "top_k": 4, "scale": 10.0, "mimicry": 1.0}
    setting = views.Setting(loss, 0, "dev", view=view, **sizes, **own)
    model, plain = taught.heads(setting), heads.train(heads.Setting("clip", 0, "dev", **sizes), train)
    assert (model.pictures(train.pictures) - plain.pictures(train.pictures)).abs().max() > 1e-5
    with pytest.raises(ValueError, match="has no arm 'other'"):
        view_losses.build(dataclasses.replace(setting, loss="other"), (300, 300))


def test_a_model_of_the_miniature_is_trained_and_measured(icons, tmp_path, monkeypatch):
    """By open_clip's own command: an option that is no flag, and a student of a teacher of its own."""
    monkeypatch.setitem(vars(PRESETS["quick"]), "pairs", 256)
    monkeypatch.setitem(PLANS["distil"]["quick"], "size", {"preset": "quick", "pairs": 256})
    monkeypatch.setitem(PLANS["distil"]["quick"]["teacher"], "pairs", 384)
    plan, search = ladder.load("distil", "quick"), ladder.load("search", "quick")
    options = argparse.Namespace(output=tmp_path, icons=icons.folder, device="cpu")
    data = Miniature(options, [256, 384], plan.teacher_attempt)
    (one_list,) = [one for one in search.tries_of[ladder.SETTING] if one.name == "one-list"]
    attempt = Attempt(one_list.name, one_list.loss, one_list.changes, 1, 10, "validation", search.label)
    alone = Miniature(options, [256])
    found = alone.train(attempt)
    assert {"cross_modal_loss", "in_modal_loss"} <= found["training"]["last"].keys()
    assert attempt.job().loss == "ablation"
    trial = plan.tries_of["mimicry"][0]
    student = Attempt(trial.name, trial.loss, trial.changes, 1, 3000, "test", plan.label)
    found = data.train(student)
    assert "mimicry_loss" in found["training"]["last"]
    assert found["metrics"].keys() >= {"retrieval/test", "teacher/test", "geometry/test"}
    assert not [*(tmp_path / "miniature/runs").iterdir()]


def test_no_seed_is_of_two_studies():
    """Of those whose results are beside each other: no setting was chosen by a seed that tests it."""
    seeds = []
    for name in (
        "photographs-1",
        "lists",
        "finetuning",
        "photographs-2a",
        "photographs-2c",
        "photographs-2d",
        "ids",
        "references",
    ):
        sizes = load(name).sizes("full")
        for several in ("seeds", "tuning_seeds", "best_seeds", "choice_seeds"):
            seeds += getattr(sizes, several, ())
        seeds += [
            seed for own in ("choice_seed", "try_seed") if (seed := getattr(sizes, own, None)) is not None
        ]
    assert len({*seeds}) == len(seeds)
    for name, plan in PLANS.items():
        own = [
            seed for one in (*plan["full"]["rounds"], plan["full"]["confirmation"]) for seed in one["seeds"]
        ]
        assert len({*own}) == len(own), name
