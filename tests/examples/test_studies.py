"""Finished studies are data that nothing changes; students of each kind are trained."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from studies import STUDIES, manifest, runner
from studies.alignment import data as alignment
from studies.alignment.search import Search
from studies.data import features
from studies.manifest import FINISHED, KINDS
from studies.records import read_lines
from studies.report import write
from studies.students.measure import hits_of_pictures


def test_finished_studies_are_as_the_manifest_has_them():
    """After an intended change: ``python -m studies.manifest``."""
    assert manifest.lines() == manifest.MANIFEST.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_study_has_its_plan_records_and_report(name):
    files = {kind: [manifest.HERE / path for path in FINISHED[name][kind]] for kind in KINDS}
    assert [file for of_kind in files.values() for file in of_kind if not file.exists()] == []
    assert all(files[kind] for kind in ("plan", "records", "report"))


@pytest.mark.parametrize("name", FINISHED)
def test_the_report_of_a_finished_study_has_the_command_that_repeats_it(name):
    """The first part of the command that makes its folder, and the command in it."""
    (report,) = (path for path in manifest.files(name) if "report" in path.parts and path.suffix == ".md")
    make_folder, repeat = manifest.commands(name)
    get_code, *_ = make_folder.split(" && ")
    assert f"`{get_code} && {repeat}`" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FINISHED)
def test_the_runner_prints_the_commands_that_repeat_a_finished_study(name, capsys):
    assert runner.main([name]) == 0
    assert capsys.readouterr().out.splitlines() == [*manifest.commands(name)]


def test_a_seed_that_is_to_be_trained_again_is_left_out_of_the_records_alone(tmp_path):
    """By the command that makes the folder of a repetition, without its part of git, on a copy of records.

    A seed has eleven records.
    """
    copy = tmp_path / "study/examples/studies/lists/results"
    shutil.copytree(manifest.HERE / "lists/results", copy)
    make_folder, _ = manifest.commands("lists", 4003)
    _, _, without_git = make_folder.partition(" && ")
    (tmp_path / "clone").mkdir()
    subprocess.run(without_git, shell=True, cwd=tmp_path / "clone", check=True)
    for name in ("emojis", "photographs"):
        before = read_lines(manifest.HERE / f"lists/results/{name}/records.jsonl")
        after = read_lines(copy / name / "records.jsonl")
        left_out = [line for line in before if line not in after]
        assert len(left_out) == 11
        assert {line["setting"]["seed"] for line in left_out} == {4003}
        assert len(before) - len(after) == 11


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_report_of_a_living_study_is_that_of_its_records(name, tmp_path, monkeypatch):
    """Written beside it, into a folder of the test."""
    run = runner.Run(runner.load(name), "full", tmp_path)
    committed = run.home / "report" / f"{run.study.report}.md"

    def write_here(path, *template, **values):
        return write(tmp_path / path.name, *template, **values)

    monkeypatch.setattr(runner, "write", write_here)
    assert run.write().read_bytes() == committed.read_bytes()


def test_without_a_name_all_names_are_shown(capsys):
    assert runner.main([]) == 0
    shown = capsys.readouterr().out
    page = (manifest.HERE / "README.md").read_text(encoding="utf-8")
    for name in (*STUDIES, *FINISHED):
        assert name in shown
        assert f"`{name}`" in page


class Encoders:
    """Encoders that need no weights."""

    def pictures(self, pictures):
        """Return a picture's pixels, averaged."""
        small = [picture.convert("RGB").resize((8, 8)) for picture in pictures]
        pixels = [np.asarray(picture, dtype=np.float32).ravel() for picture in small]
        return np.stack(pixels) / 255 + 0.01

    def sentences(self, sentences):
        """Return numbers drawn by a sentence's hash."""

        def drawn(sentence):
            seed = int(hashlib.sha256(sentence.encode()).hexdigest()[:8], 16)
            return np.random.default_rng(seed).normal(size=12).astype(np.float32)

        return np.stack([drawn(sentence) for sentence in sentences])


class Unused(Encoders):
    """Encoders whose features are all there."""

    def __init__(self):
        raise AssertionError("features are computed again")


def train_quickly(run, encoders):
    """Train the missing trainings of a quick run with encoders of some class."""
    options = SimpleNamespace(output=run.output, icons=run.output, data=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "FrozenEncoders", encoders)
        run.train(alignment.data(run.study.sizes("quick"), options), Console(quiet=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quick run of the study of the alignment, whose trainings are done."""
    run = runner.Run(runner.load("alignment"), "quick", tmp_path_factory.mktemp("quick"))
    train_quickly(run, Encoders)
    return run


def test_a_study_without_trainings_has_no_report(tmp_path):
    with pytest.raises(RuntimeError, match="results holds no record: nothing to report"):
        runner.Run(runner.load("alignment"), "quick", tmp_path).write()


def test_the_report_of_a_small_study_says_that_it_is_a_smoke_test(trained):
    assert "smoke test" in trained.write().read_text(encoding="utf-8")


def test_neither_features_nor_trainings_are_done_again(trained):
    before = trained.stores["emojis"].path.read_bytes()
    train_quickly(trained, Unused)
    assert trained.stores["emojis"].path.read_bytes() == before


def test_the_hits_of_a_record_are_those_of_its_recall(trained):
    """Both in percent; they differ by two points at most, for of tied pictures the recall counts a part."""
    records = trained.stores["emojis"].find().values()
    pictures = []
    for record in records:
        hits, metrics = hits_of_pictures(record), record["metrics"]
        assert hits.mean() == pytest.approx(metrics["retrieval"]["R@10, mean of both"], abs=2)
        assert len(hits) == metrics["hits"]["pictures"]
        pictures.append(len(hits))
    assert max(pictures) > 50, "so many that two points are more than a picture"


def test_a_search_finds_a_copy():
    """A training picture and the mean of its captions are each other's best answer, with equal features.

    A feature is the neighbour's picture beside the mean of its captions: with one neighbour, a training
    pair's own.
    """
    generator = torch.Generator().manual_seed(0)
    side = features.Side(torch.randn(40, 6, generator=generator), torch.randn(40, 2, 5, generator=generator))
    model = Search(side, k=1)
    v = model.pictures(side.pictures)
    t = model.sentences(side.sentences.mean(1, keepdim=True))[:, 0]
    similarity = v @ t.T
    assert torch.equal(similarity.argmax(1), torch.arange(40))
    assert torch.equal(similarity.argmax(0), torch.arange(40))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(40))
