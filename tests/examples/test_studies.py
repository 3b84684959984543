"""Finished studies are data that nothing changes; students of each kind are trained."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from studies import STUDIES, manifest, runner
from studies.data import drawings
from studies.manifest import FINISHED, KINDS
from studies.students import losses, train


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


def test_without_a_name_all_names_are_shown(capsys):
    assert runner.main([]) == 0
    shown = capsys.readouterr().out
    page = (manifest.HERE / "README.md").read_text(encoding="utf-8")
    for name in (*STUDIES, *FINISHED):
        assert name in shown
        assert f"`{name}`" in page


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


@pytest.mark.parametrize("arm", losses.NAMES)
def test_a_student_of_each_kind(arm, icons, tmp_path):
    """On icons; the features are kept."""
    sides = drawings.icons(icons, 60, 20)
    data = drawings.data_set(sides, tmp_path, Encoders)
    again = drawings.data_set(sides, tmp_path, Unused)
    assert again.fingerprint == data.fingerprint
    found = data.train(train.Setting(arm, 0, "dev", epochs=2, batch_size=20, train_pictures=60))
    assert found["metrics"].keys() == {"retrieval", "geometry"}
