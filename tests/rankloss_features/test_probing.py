"""A folder of features knows its encoders by what they compute, where their weights are the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import tiny_teacher as tiny

from rankloss_features import Features, command
from rankloss_features.folder import NAMES, Draft, read_about, write_about

with_and_without_align = pytest.mark.parametrize("align", [(), ("--align",)], ids=["plain", "aligned"])


@pytest.fixture
def encoders(sample_folder: Path, tmp_path: Path) -> Path:
    """A folder with encoders that a test may change."""
    for name in ("image_encoder", "text_encoder"):
        shutil.copytree(sample_folder / name, tmp_path / name)
    return tmp_path


def run_features(encoders: Path, data: Path, output: Path, *options: str) -> int:
    """Run ``rankloss features`` with both encoders of a folder; the exit code."""
    named = ["--image-encoder", f"{encoders}/image_encoder", "--text-encoder", f"{encoders}/text_encoder"]
    return command.main([*named, "--data", str(data), "--output", str(output), "--workers", "0", *options])


INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended: 128 and the number of SIGINT."""


def interrupt(*_: Any) -> NoReturn:
    """Stands in for a step of a command, during which its user presses Ctrl-C."""
    raise KeyboardInterrupt


def forget_probe(folder: Path) -> None:
    """Make a folder one of an earlier release, which did not store features of fixed inputs."""
    about = dict(read_about(folder) or {})
    del about["probe"]
    write_about(folder, about)


def contents(folder: Path) -> dict[Path, bytes]:
    """The bytes of each file below a folder."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- encoders that prepare their inputs otherwise -----------------------------------------------------------


@with_and_without_align
@pytest.mark.parametrize("changed", NAMES)
@pytest.mark.parametrize("state", ["interrupted", "complete"])
def test_a_folder_does_not_go_on_with_an_encoder_that_prepares_its_inputs_otherwise(
    sample_folder: Path, encoders: Path, state: str, changed: str, align: Any, monkeypatch: Any, capsys: Any
) -> None:
    arguments = (encoders, sample_folder / "train.csv", encoders / "x", *align)
    with monkeypatch.context() as patch:
        if state == "interrupted":
            patch.setattr(Draft, "finish", interrupt)
        exit_code = INTERRUPTED if state == "interrupted" else 0
        assert run_features(*arguments) == exit_code
    before = contents(encoders / "x")
    tiny.prepare_otherwise(encoders, changed)
    capsys.readouterr()
    assert run_features(*arguments) == 1
    name = changed.replace("_features", "_encoder")
    encoder = f"another {name} {encoders}/{name}: {changed} of a fixed"
    # The encoders' own features stand in .encoders until they are aligned.
    folder = f"{encoders}/x(/.encoders)?"
    assert re.search(f"--output {folder} .*{encoder} .*delete the folder", capsys.readouterr().err)
    assert contents(encoders / "x") == before


@pytest.mark.parametrize("changed", NAMES)
def test_projections_are_refused_to_an_encoder_that_prepares_its_inputs_otherwise(
    sample_folder: Path, encoders: Path, changed: str, capsys: Any
) -> None:
    assert run_features(encoders, sample_folder / "train.csv", encoders / "x", "--align") == 0
    tiny.prepare_otherwise(encoders, changed)
    capsys.readouterr()
    assert run_features(encoders, sample_folder / "val.csv", encoders / "y", "--align", f"{encoders}/x") == 1
    words = (
        f"--align {encoders}/x has the features of another ",
        f"{changed} of a fixed input have a cosine",
        "align the new one",
    )
    assert re.search(".*".join(words), capsys.readouterr().err)
    assert not (encoders / "y").exists()


def test_projections_serve_encoders_that_did_not_change(sample_folder: Path, encoders: Path) -> None:
    assert run_features(encoders, sample_folder / "train.csv", encoders / "x", "--align") == 0
    assert run_features(encoders, sample_folder / "val.csv", encoders / "y", "--align", f"{encoders}/x") == 0


# --- folders of an earlier release --------------------------------------------------------------------------


def test_a_folder_has_features_of_a_fixed_input_of_each_encoder(sample_folder: Path, encoders: Path) -> None:
    assert run_features(encoders, sample_folder / "train.csv", encoders / "x") == 0
    assert Features(str(encoders / "x")).about["probe"].keys() == {*NAMES}


@with_and_without_align
def test_a_folder_of_an_earlier_release_is_read_and_is_complete_to_its_command(
    sample_folder: Path, encoders: Path, align: Any
) -> None:
    arguments = (encoders, sample_folder / "train.csv", encoders / "x", *align)
    assert run_features(*arguments) == 0
    forget_probe(encoders / "x")
    Features(str(encoders / "x")).check()
    assert run_features(*arguments) == 0


def test_projections_of_an_earlier_release_serve_new_pairs(sample_folder: Path, encoders: Path) -> None:
    assert run_features(encoders, sample_folder / "train.csv", encoders / "x", "--align") == 0
    forget_probe(encoders / "x")
    assert run_features(encoders, sample_folder / "val.csv", encoders / "y", "--align", f"{encoders}/x") == 0


def test_the_encoders_own_features_of_an_earlier_release_are_aligned(
    sample_folder: Path, encoders: Path, monkeypatch: Any
) -> None:
    arguments = (encoders, sample_folder / "train.csv", encoders / "x", "--align")
    with monkeypatch.context() as patch:
        patch.setattr("rankloss_features.aligning.align", interrupt)
        assert run_features(*arguments) == INTERRUPTED
    forget_probe(encoders / "x/.encoders")
    assert run_features(*arguments) == 0
    assert "probe" not in Features(str(encoders / "x")).check().about
