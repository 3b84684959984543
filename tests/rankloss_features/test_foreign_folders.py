"""A folder that another made: its hashes agree with its entries, and one of these is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankloss_features import Features, command
from rankloss_features.folder import ABOUT, _hash_of_entries
from stored_features import features_folder

ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
"""Features of six pairs."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as we write it."""
    return Path(
        features_folder(tmp_path_factory.mktemp("own") / "x", image_features=ROWS, text_features=ROWS[::-1])
    )


def rewritten(ours: Path, folder: Path, **entries: Any) -> Path:
    """A copy with other entries, and the hash that its maker gives them; None takes an entry away."""
    shutil.copytree(ours, folder)
    about = {**json.loads((folder / ABOUT).read_text()), **entries}
    del about["hash"]
    about = {name: value for name, value in about.items() if value is not None}
    (folder / ABOUT).write_text(json.dumps({**about, "hash": _hash_of_entries(about)}))
    return folder


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("shard_rows", 0),
        ("shard_rows", "6"),
        ("shard_rows", None),
        ("rows", -1),
        ("rows", 6.0),
        ("rows", True),
        ("rows", [6]),
        ("widths", {}),
        ("widths", {"image_features": "4"}),
        ("widths", {"sound_features": 4}),
        ("widths", [4, 4]),
        ("widths", None),
        ("dtype", "object"),
        ("dtype", {}),
        ("spaces", 2),
        ("spaces", None),
        ("complete", 1),
        ("complete", None),
        ("files", []),
        ("files", {"pairs.npy": 1}),
        ("skipped", None),
        ("skipped", "0"),
        ("teacher", "a"),
        ("command", 3),
        ("probe", ["3c00"]),
        ("probe", {"image_features": "3c0"}),
        ("probe", {"sound_features": "3c00"}),
    ],
    ids=str,
)
def test_an_entry_of_another_kind_is_named(ours: Path, tmp_path: Path, entry: str, value: Any) -> None:
    folder = rewritten(ours, tmp_path / "x", **{entry: value})
    words = f"'{entry}' must be .*; got {re.escape(repr(value))}"
    if value is None:
        words = f"it has no entry '{entry}'"
    with pytest.raises(ValueError, match=f"{folder / ABOUT} is damaged: {words}"):
        Features(str(folder))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
"""Any values that JSON can hold."""
ENTRIES = [
    "rows",
    "shard_rows",
    "widths",
    "dtype",
    "spaces",
    "complete",
    "files",
    "skipped",
    "teacher",
    "data",
    "probe",
]


@given(st.dictionaries(st.sampled_from(ENTRIES), VALUES, min_size=1))
def test_any_entries_are_a_folder_or_one_kind_of_error(
    ours: Path, tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]
) -> None:
    """The error names the folder; else its features are those that were written."""
    folder = rewritten(ours, tmp_path_factory.mktemp("foreign") / "x", **entries)
    folder_or_words = opened_or_refused(folder)
    if isinstance(folder_or_words, str):
        assert str(folder) in folder_or_words
    else:
        np.testing.assert_array_equal(folder_or_words.arrays["image_features"][:], ROWS)


def opened_or_refused(folder: Path) -> Features | str:
    """The folder, or the words of the refusal; any other error is the test's."""
    try:
        return Features(str(folder)).check()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"3", b"", b"\x00", b"\xff"],
    ids=["deep list", "deep object", "number", "empty", "a zero byte", "no UTF-8"],
)
def test_a_folder_json_without_an_object_is_named(ours: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(ours, tmp_path / "x"))
    (folder / ABOUT).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder / ABOUT} (cannot be read|is damaged)"):
        Features(str(folder))


@pytest.mark.parametrize("name", [ABOUT, "pairs.npy", "image_features-00000.npy"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_a_files_place_is_refused_at_once(
    ours: Path, tmp_path: Path, name: str, make: Any
) -> None:
    folder = Path(shutil.copytree(ours, tmp_path / "x"))
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(ValueError, match=f"{folder / name} cannot be read: it is no regular file"):
        Features(str(folder))


def test_the_command_reports_a_foreign_folder_in_one_line(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rewritten(ours, tmp_path / "x", shard_rows=0)
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\n0.png\ta0\n")
    assert command.main(["--check", str(folder), "--data", str(tmp_path / "pairs.csv")]) == 1
    assert "'shard_rows' must be a number of rows from 1; got 0" in capsys.readouterr().err
