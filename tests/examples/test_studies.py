"""Every study: its report follows from its records, its small size is trained to its end."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image
from studies import STUDIES, runner
from studies.miniature.settings import PLANS
from studies.photographs import (
    drawings,
    features,
    student_losses,
    train,
)
from studies.runner import Run, load


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
        with pytest.raises(RuntimeError, match=r"nothing to report|trainings are missing"):
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
