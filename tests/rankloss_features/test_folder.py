"""A folder is read as it was written, or refused with the name of the file; and its principal components."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import ROWS, csv_data, data_of, files, flip, shards, table, teacher, written
from torch import Tensor

from rankloss_features import Features
from rankloss_features.checking import report
from rankloss_features.data import Data, Sample, Shards
from rankloss_features.folder import NAMES, read_about, write_about
from rankloss_features.teachers import Encoder, Teacher


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return data_of("csv", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    """A folder ``whole``, and a folder ``other`` of the same pairs in another order."""
    place = tmp_path_factory.mktemp("folders")
    written(place / "whole", data, teacher())
    (place / "others").mkdir()
    others = csv_data(table(place / "others", order=[*range(1, ROWS), 0]))
    written(place / "other", others, teacher(weights="1"))
    return place


def test_the_files_are_arrays_of_numpy_in_the_order_of_the_rows(place: Path) -> None:
    features = Features(str(place / "whole")).check()
    for name in NAMES:
        array = np.concatenate([np.load(x) for x in sorted((place / "whole").glob(f"{name}-*.npy"))])
        assert len(array) == ROWS
        for found in (features, pickle.loads(pickle.dumps(features))):
            np.testing.assert_array_equal(found.arrays[name][:], array)
            np.testing.assert_array_equal(found.arrays[name][11:37:2], array[11:37:2])
            np.testing.assert_array_equal(found.take(np.array([39, 0, 12, 12]))[name], array[[39, 0, 12, 12]])
        for rows in ([ROWS], [-1], [True] * ROWS, [0.5]):
            with pytest.raises(IndexError, match=f"from 0 to {ROWS - 1}; got"):
                features.arrays[name][rows]
    assert read_about(place / "whole")["rows"] == ROWS


# --- damage -----------------------------------------------------------------------------------------------

Change = Callable[[Path, Path], Any]
"""Damage to a folder, of which another data set's is given."""


def on(file: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder, _: (folder / file).write_bytes(change((folder / file).read_bytes()))


def array_of(file: str, change: Callable[[Any], Any]) -> Change:
    return lambda folder, _: np.save(folder / file, change(np.load(folder / file)))


def of_the_other(*names: str) -> Change:
    return lambda folder, other: [shutil.copy(other / name, folder / name) for name in names]


def entries(change: Callable[[dict[str, Any]], Any]) -> Change:
    def damage(content: bytes) -> bytes:
        about = json.loads(content)
        change(about)
        return json.dumps(about).encode()

    return on("folder.json", damage)


def exchanged(folder: Path, _: Path) -> None:
    first, second = (folder / f"image_features-0000{i}.npy" for i in (0, 1))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


SHARDS = [f"{name}-00001.npy" for name in NAMES]
FILES = ["folder.json", "pairs.npy", *SHARDS]
ANY = {
    "empty": lambda _: b"",
    "cut in its beginning": lambda x: x[:70],
    "cut at its end": lambda x: x[:-9],
    "longer": lambda x: x + b"0",
    "zeros": lambda x: bytes(len(x)),
}
ARRAY = {
    "reversed": lambda x: x[::-1],
    "of another type": lambda x: x.astype(np.float64),
    "of integers": lambda x: x.view(f"i{x.itemsize}"),
    "of objects": lambda x: x.astype(object),
    "of fewer rows": lambda x: x[:-1],
}
DAMAGES: dict[str, Change] = {
    **{f"{file}, missing": (lambda folder, _, file=file: (folder / file).unlink()) for file in FILES},
    **{f"{file}, a bit": (lambda folder, _, file=file: flip(folder / file)) for file in FILES},
    **{f"{file}, {kind}": on(file, change) for file in FILES for kind, change in ANY.items()},
    **{f"{file}, {kind}": array_of(file, change) for file in FILES[1:] for kind, change in ARRAY.items()},
    **{f"{file} of another data set": of_the_other(file) for file in FILES},
    "features of another data set": of_the_other(*SHARDS),
    "all but the entries of another data set": of_the_other("pairs.npy", *SHARDS),
    "image_features-00000.npy, exchanged with the next": exchanged,
    "a list for entries": on("folder.json", lambda _: b"[]"),
    "an entry missing": entries(lambda about: about.pop("teacher")),
    "an entry changed": entries(lambda about: about.update(rows=ROWS - 1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_folders_command_mends_it_or_says_why_not(
    place: Path, data: Data, tmp_path: Path, damage: str
) -> None:
    folder, data = (
        Path(shutil.copytree(place / "whole", tmp_path / "damaged")),
        data_of("csv", place / "data"),
    )
    DAMAGES[damage](folder, place / "other")
    named = damage.split(",")[0] if "," in damage and damage != "folder.json, missing" else str(folder)
    for read in (lambda: Features(str(folder)).check(), lambda: report(str(folder), data)):
        with pytest.raises(ValueError, match=named):
            read()
    if "features" in damage:
        written(folder, data, teacher())
        assert files(folder) == files(place / "whole")
    else:
        with pytest.raises(ValueError, match=str(folder)):
            written(folder, data, teacher())


def test_every_trainer_refuses_a_damaged_folder(place: Path, tmp_path: Path) -> None:
    if not all(map(importlib.util.find_spec, ("transformers", "accelerate", "sentence_transformers"))):
        pytest.skip("a trainer is not installed")
    import tiny_sentences
    import tiny_transformers

    from rankloss_open_clip.arguments import HOST
    from rankloss_trainers import catalog
    from rankloss_trainers.run_options import RunOptions
    from rankloss_trainers.runtime import Runtime
    from rankloss_trainers.sentence_transformers import ContrastiveLoss

    folder, model = Path(shutil.copytree(place / "whole", tmp_path / "damaged")), tiny_transformers.clip()
    teacher = str(folder)
    trainers = (
        lambda: Runtime(HOST, catalog.choose("rankclip"), RunOptions(teacher=teacher)),
        lambda: tiny_transformers.trainer(tmp_path, model=model, loss="rankclip", teacher=teacher),
        lambda: ContrastiveLoss(tiny_sentences.tiny(tmp_path), "rankclip", teacher=teacher),
    )
    for train in trainers:
        train()
    flip(folder / SHARDS[0])
    for train in trainers:
        with pytest.raises(ValueError, match=rf"{SHARDS[0]} is not as it was written"):
            train()


def test_folders_that_are_older_or_unfinished_are_refused_with_their_command(
    place: Path, data: Data, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(place / "whole", tmp_path / "x"))
    command = "rm -rf ~ #\x1b[2J"
    write_about(folder, {**(read_about(folder) or {}), "complete": False, "command": command})
    quoted = r"'rm -rf ~ #\\x1b\[2J'"
    with pytest.raises(ValueError, match=f"unfinished.*{quoted}"):
        Features(str(folder))
    with pytest.raises(ValueError, match=f"another batch_size, 8, not 4.*{quoted}"):
        written(folder, data, teacher(), batch_size=4)
    (folder / "folder.json").unlink()
    (folder / "features.json").write_text(json.dumps({"format": 2, "rows": 7, "command": command}))
    for read in (lambda: Features(str(folder)), lambda: written(folder, data, teacher())):
        with pytest.raises(
            ValueError, match=f"features.json .*delete it and give its command again, {quoted}"
        ):
            read()


# --- components -------------------------------------------------------------------------------------------

WIDTH, KEPT = 12, 5


def spread(widths: tuple[int, ...] = (WIDTH, WIDTH), **about: Any) -> Teacher:
    """Features of unequal variances, in a basis of their own; of images alone for one width."""
    encoders = {}
    for i, (name, width) in enumerate(zip(NAMES, widths, strict=False)):
        basis = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
        noise = np.random.default_rng([0, i]).standard_normal((ROWS, width))
        rows = torch.from_numpy(noise * 0.7 ** np.arange(width) @ basis).float()

        def prepare(samples: list[Sample], rows: Tensor = rows) -> Tensor:
            return rows[[x.row for x in samples]]

        encoders[name] = Encoder(prepare, lambda x: x, width, needs_pictures=i == 0)
    return Teacher({}, encoders, **about)


@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH,)])
def test_components_are_those_of_a_singular_value_decomposition(
    tmp_path: Path, widths: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of both modalities, or of one and without the rows that have no features."""
    features = written(tmp_path / "x", Shards(shards(tmp_path, broken=(2, 5))), spread(widths))
    rows = np.concatenate([x[:] for x in features.arrays.values()]).astype(np.float64)
    rows = rows[rows.any(1)]
    _, values, vectors = np.linalg.svd(
        rows / np.linalg.norm(rows, axis=1, keepdims=True), full_matrices=False
    )
    for width in (1, KEPT, WIDTH):
        with caplog.at_level(logging.INFO, "rankloss_features"):
            found = Features(features.path).components(width)
        matrix = found.matrix.double().numpy()
        assert found.matrix.dtype == torch.float32
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(width), atol=1e-6)
        np.testing.assert_allclose(matrix @ matrix.T, vectors[:width].T @ vectors[:width], atol=1e-5)
        assert found.explained == pytest.approx((values[:width] ** 2).sum() / (values**2).sum(), abs=1e-6)
        assert (np.take_along_axis(matrix, np.abs(matrix).argmax(0)[None], 0) > 0).all()
        assert (
            f"{width} of {WIDTH} dimensions, explained variance {100 * found.explained:.1f} %" in caplog.text
        )


def test_folders_without_such_components_are_refused(tmp_path: Path, data: Data) -> None:
    features = written(tmp_path / "x", data, spread((ROWS + 5,) * 2))
    features.components(ROWS)
    for width in (ROWS + 1, 0):
        with pytest.raises(ValueError, match=f"{ROWS + 5} dimensions and the {ROWS} rows .*; got {width}"):
            features.components(width)
    flip(tmp_path / "x/text_features-00001.npy")
    with pytest.raises(ValueError, match=r"text_features-00001\.npy is not as it was written"):
        features.components(KEPT)
    for widths in ((WIDTH, WIDTH), (WIDTH, 4)):
        features = written(tmp_path / f"{widths}", data, spread(widths, spaces="separate"))
        with pytest.raises(ValueError, match=r"separate spaces.*--loss rankclip-distill"):
            features.components(4)
