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
def test_a_finished_study_is_whole_and_its_report_says_how_it_is_repeated(name, capsys):
    of_kind = {kind: [manifest.HERE / path for path in FINISHED[name][kind]] for kind in KINDS}
    assert all(path.exists() for of in of_kind.values() for path in of)
    assert all(of_kind[kind] for kind in ("plan", "records", "report"))
    (report,) = (path for path in manifest.files(name) if "report" in path.parts and path.suffix == ".md")
    made, repeated = manifest.commands(name)
    assert f"`{made.partition(' && ')[0]} && {repeated}`" in report.read_text(encoding="utf-8")
    assert runner.main([name]) == 0
    assert capsys.readouterr().out.splitlines() == [made, repeated]


def test_a_seed_is_left_out_of_the_records_alone(tmp_path, monkeypatch):
    """The first command without git, on a copy."""
    copy = tmp_path / "study/examples/studies/lists/results"
    shutil.copytree(manifest.HERE / "lists/results", copy)
    made, _ = manifest.commands("lists", 4003)
    (tmp_path / "clone").mkdir()
    subprocess.run(made.partition(" && ")[2], shell=True, cwd=tmp_path / "clone", check=True)
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
    run = runner.Run(runner.load(name), "full", tmp_path)
    report = run.home / "report" / f"{run.study.report}.md"
    monkeypatch.setattr(
        runner, "write", lambda path, *of, **values: write(tmp_path / path.name, *of, **values)
    )
    assert run.write().read_bytes() == report.read_bytes()


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
        small = [np.asarray(one.convert("RGB").resize((8, 8)), dtype=np.float32).ravel() for one in pictures]
        return np.stack(small) / 255 + 0.01

    def sentences(self, sentences):
        """Return numbers drawn by a sentence's hash."""
        seeds = (int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in sentences)
        return np.stack([np.random.default_rng(seed).normal(size=12).astype(np.float32) for seed in seeds])


class Unused(Encoders):
    """Encoders whose features are all there."""

    def __init__(self):
        raise AssertionError("features are computed again")


def test_a_small_study_is_trained_and_reported_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "FrozenEncoders", Encoders)
    study = runner.load("alignment")
    options = SimpleNamespace(output=tmp_path, icons=tmp_path, data=None)
    run = runner.Run(study, "quick", tmp_path)
    with pytest.raises(RuntimeError, match="results"):
        run.write()
    console = Console(quiet=True)
    run.train(alignment.data(study.sizes("quick"), options), console)
    text = run.write().read_text(encoding="utf-8")
    assert "smoke test" in text
    trained = run.stores["emojis"].path.read_bytes()
    monkeypatch.setattr(alignment, "FrozenEncoders", Unused)
    run.train(alignment.data(study.sizes("quick"), options), console)
    assert run.stores["emojis"].path.read_bytes() == trained
    for record in run.stores["emojis"].find().values():
        found = hits_of_pictures(record)
        assert found.mean() == pytest.approx(record["metrics"]["retrieval"]["R@10, mean of both"], abs=2)
    assert len(found) == record["metrics"]["hits"]["pictures"] > 50


def test_a_search_finds_a_copy():
    """A picture and a caption of a training pair are each other's best answer."""
    generator = torch.Generator().manual_seed(0)
    side = features.Side(torch.randn(40, 6, generator=generator), torch.randn(40, 2, 5, generator=generator))
    model = Search(side, 1)
    v, t = model.pictures(side.pictures), model.sentences(side.sentences.mean(1, keepdim=True))[:, 0]
    assert torch.equal((v @ t.T).argmax(1), torch.arange(40))
    assert torch.equal((v @ t.T).argmax(0), torch.arange(40))
    torch.testing.assert_close((v @ t.T).diagonal(), torch.ones(40))
