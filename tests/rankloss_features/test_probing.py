"""A folder of features knows its encoders by what they compute, where their weights are the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher as tiny

from rankloss_features import Features, command
from rankloss_features.folder import NAMES, Draft, read_about, write_about


@pytest.fixture
def encoders(sample_folder: Path, tmp_path: Path) -> Path:
    """A folder with encoders that a test may change."""
    for name in ("image_encoder", "text_encoder"):
        shutil.copytree(sample_folder / name, tmp_path / name)
    return tmp_path


def features(encoders: Path, data: Path, output: Path, *options: str) -> int:
    named = ["--image-encoder", f"{encoders}/image_encoder", "--text-encoder", f"{encoders}/text_encoder"]
    return command.main([*named, "--data", str(data), "--output", str(output), "--workers", "0", *options])


def without_probe(folder: Path) -> None:
    """Make a folder one of an earlier release."""
    about = dict(read_about(folder) or {})
    del about["probe"]
    write_about(folder, about)


@pytest.mark.parametrize("align", [(), ("--align",)])
@pytest.mark.parametrize("changed", NAMES)
def test_an_encoder_with_other_preparation_of_its_inputs_does_not_go_on(
    sample_folder: Path, encoders: Path, changed: str, align: Any, monkeypatch: Any, capsys: Any
) -> None:
    given = (encoders, sample_folder / "train.csv", encoders / "x", *align)
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert features(*given) == 130
    capsys.readouterr()
    begun = {file: file.read_bytes() for file in (encoders / "x").rglob("*") if file.is_file()}
    shutil.copytree(encoders / "x", encoders / "whole")
    assert features(*given[:2], encoders / "whole", *align) == 0
    tiny.prepare_otherwise(encoders, changed)
    for output in ("x", "whole"):
        assert features(*given[:2], encoders / output, *align) == 1
        error = capsys.readouterr().err
        assert f"--output {encoders / output}" in error
        modality = changed.removesuffix("_features")
        assert f"another {modality}_encoder {encoders}/{modality}_encoder: {changed} of a fixed" in error
        assert "delete the folder" in error
    assert {file: file.read_bytes() for file in begun} == begun


@pytest.mark.parametrize("changed", NAMES)
def test_projections_of_an_encoder_with_other_preparation_are_refused(
    sample_folder: Path, encoders: Path, changed: str, capsys: Any
) -> None:
    assert features(encoders, sample_folder / "train.csv", encoders / "x", "--align") == 0
    given = (encoders, sample_folder / "val.csv", encoders / "y", "--align", f"{encoders}/x")
    assert features(*given) == 0
    shutil.rmtree(encoders / "y")
    tiny.prepare_otherwise(encoders, changed)
    assert features(*given) == 1
    error = capsys.readouterr().err
    assert f"--align {encoders}/x has the features of another " in error
    assert f"{changed} of a fixed input have a cosine" in error
    assert "align the new one" in error
    assert not (encoders / "y").exists()


@pytest.mark.parametrize("align", [(), ("--align",)])
def test_a_folder_of_an_earlier_release_is_read_and_goes_on(
    sample_folder: Path, encoders: Path, align: Any
) -> None:
    output = encoders / "x"
    assert features(encoders, sample_folder / "train.csv", output, *align) == 0
    assert {*(read_about(output) or {})["probe"]} == {*NAMES}
    without_probe(output)
    Features(str(output)).check()
    assert features(encoders, sample_folder / "train.csv", output, *align) == 0
    if align:
        assert features(encoders, sample_folder / "val.csv", encoders / "y", "--align", str(output)) == 0


def test_the_encoders_own_features_of_an_earlier_release_are_aligned(
    sample_folder: Path, encoders: Path, monkeypatch: Any
) -> None:
    given = (encoders, sample_folder / "train.csv", encoders / "x", "--align")
    with monkeypatch.context() as patch:
        patch.setattr("rankloss_features.aligning.align", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert features(*given) == 130
    without_probe(encoders / "x/.encoders")
    assert features(*given) == 0
    assert "probe" not in Features(str(encoders / "x")).check().about
