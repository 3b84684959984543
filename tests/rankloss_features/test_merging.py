"""Merged folders: cosines are the weighted means of the folders' cosines, and other pairs are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import ROWS, csv_data, files, shards, table, teacher, written

from rankloss_features import Features
from rankloss_features.data import Data, Shards
from rankloss_features.folder import NAMES
from rankloss_features.merging import load
from rankloss_features.teachers import Encoder, Teacher
from rankloss_trainers.console import main


def noise(seed: int, widths: tuple[int, ...], names: Any = NAMES, spaces: str = "common") -> Teacher:
    """A teacher of random features; a pair whose picture is damaged has none."""
    encoders = {}
    for name, width in zip(names, widths, strict=True):
        rows = torch.from_numpy(np.random.default_rng([seed, width]).standard_normal((ROWS, width))).float()

        def prepare(samples: Any, rows: torch.Tensor = rows) -> torch.Tensor:
            return rows[[x.row for x in samples]]

        encoders[name] = Encoder(prepare, lambda x: x, width, needs_pictures=True)
    return Teacher({"weights": str(seed)}, encoders, spaces=spaces)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return csv_data(table(tmp_path_factory.mktemp("data")))


def merge(*given: object) -> int:
    return main(["features", "--merge", *map(str, given)])


def cosines(array: Any) -> Any:
    rows = np.asarray(array, np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


@pytest.mark.parametrize(("names", "scales"), [(NAMES, (3.0, 0.1)), (NAMES[1:], ())])
def test_cosines_are_weighted_means(tmp_path: Path, data: Data, names: Any, scales: Any) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        written(folder, data, noise(seed, (5 + seed, 3 * seed + 4)[: len(names)], names), dtype="float32")
    given = ["--scales", *scales] if scales else []
    output = tmp_path / "ab"
    assert merge(*folders, *given, "--output", output, "--dtype", "float32", "--batch-size", 7) == 0
    found, weights = Features(str(output)).check(), scales or (1.0, 1.0)
    assert list(found.arrays) == list(names)
    for name, array in found.arrays.items():
        parts = [cosines(Features(str(folder)).arrays[name]) for folder in folders]
        np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-6)
        expected = np.average(parts, axis=0, weights=weights)
        np.testing.assert_allclose(array.astype(np.float64) @ array.T, expected, atol=1e-6)


@pytest.mark.parametrize("spaces", [("common",) * 2, ("common", "separate")])
def test_the_space_is_common_if_all_are(tmp_path: Path, data: Data, spaces: Any) -> None:
    for i, x in enumerate(spaces):
        written(tmp_path / str(i), data, noise(i, (4, 4), spaces=x))
    assert merge(tmp_path / "0", tmp_path / "1", "--output", tmp_path / "x") == 0
    assert Features(str(tmp_path / "x")).common_space == ("separate" not in spaces)


def test_rows_without_a_picture_in_any_folder_stay_absent(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    urls = shards(tmp_path / "pictures", broken=(2, 5))
    written(tmp_path / "a", Shards(urls), noise(0, (4, 4)))
    shards(tmp_path / "pictures", broken=(5, 8))
    written(tmp_path / "b", Shards(urls), noise(1, (4, 4)))
    assert merge(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab") == 0
    found = Features(str(tmp_path / "ab")).check()
    both = [Features(str(tmp_path / x)).present(slice(None)) for x in "ab"]
    np.testing.assert_array_equal(found.present(slice(None)), both[0] & both[1])
    assert found.about["skipped"] == 3


def test_a_merged_folder_is_like_any_other(tmp_path: Path, capsys: Any) -> None:
    file = table(tmp_path)
    for i in range(2):
        written(tmp_path / str(i), csv_data(file), noise(i, (4, 4)))
    given = (tmp_path / "0", tmp_path / "1", "--output", tmp_path / "x")
    assert merge(*given) == 0
    whole = files(tmp_path / "x")
    images = np.load(tmp_path / "x/image_features.npy", mmap_mode="r+")
    images[3, 2:] = 0
    images.flush()
    assert merge(*given) == 0  # goes on where rows do not fit
    assert files(tmp_path / "x") == whole
    assert main(["features", "--check", str(tmp_path / "x"), "--data", str(file)]) == 0
    assert "R@1 among 40 pairs" in capsys.readouterr().out
    assert merge(*given, "--scales", 1, 2) == 1
    assert "was begun with another teacher" in capsys.readouterr().err
    np.save(tmp_path / "x/pairs.npy", np.arange(ROWS, dtype=np.uint64))
    assert merge(*given) == 1
    assert "pairs.npy is not as it was written" in capsys.readouterr().err


def test_folders_that_do_not_go_together_are_refused(tmp_path: Path, data: Data) -> None:
    a = written(tmp_path / "a", data, teacher()).path
    places = {name: tmp_path / name for name in ("other", "more", "images", "damaged")}
    for name in ("other", "more"):
        (tmp_path / f"{name}-data").mkdir()
    swapped = csv_data(table(tmp_path / "other-data", order=[0, 2, 1, *range(3, ROWS)]))
    fewer = csv_data(table(tmp_path / "more-data", [f"picture {i} of {i % 7} apples" for i in range(30)]))
    written(places["other"], swapped, teacher())
    written(places["more"], fewer, teacher())
    written(places["images"], data, noise(0, (4,), NAMES[:1]))
    written(places["damaged"], data, teacher())
    images = np.load(places["damaged"] / "image_features.npy", mmap_mode="r+")
    images[3] = images[4]
    images.flush()
    messages = {
        "other": "row 1 of .*other.* is not row 1 of .*/a",
        "more": "row 30 of .*more, of 30 rows, is not row 30 of .*/a, of 40 rows",
        "images": "modalities; .*/a has image_features and text_features, .*images has image_features$",
        "damaged": "row 3 of .*damaged is not as it was written",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            load([a, str(places[name])], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--merge", "A"), "two folders or more, .* got 1"),
        (("--merge", "A", "A", "--scales", "1"), "one number for each; got 2 and 1"),
        (("--merge", "A", "A", "--scales", "1", "0"), r"--scales must be positive numbers; got \[1.0, 0.0\]"),
        (("--merge", "A", "A", "--data", "x.csv"), "--merge has the pairs .* got --data x.csv"),
        (("--merge", "A", "none"), "none is no folder of `rankloss features`"),
        (("--text-encoder", "x", "--data", "x.csv", "--scales", "1"), "--scales .* belongs to --merge"),
        (("--text-encoder", "x"), "--data is needed"),
    ],
)
def test_a_command_that_merges_nothing_is_refused(
    tmp_path: Path, data: Data, options: Any, message: str, capsys: Any
) -> None:
    written(tmp_path / "A", data, teacher())
    given = [str(tmp_path / "A") if x == "A" else x for x in options]
    assert main(["features", *given, "--output", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
