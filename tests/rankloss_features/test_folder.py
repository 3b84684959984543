"""A folder is whole or refused, whatever became of its files; and its principal components."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_teacher import (
    ROWS,
    csv_data,
    data_of,
    files,
    in_process,
    on_damaged_row,
    shards,
    table,
    teacher,
    written,
)
from torch import Tensor

if not all(map(importlib.util.find_spec, ("transformers", "accelerate", "sentence_transformers"))):
    pytest.skip("a trainer is not installed", allow_module_level=True)

import tiny_sentences
import tiny_transformers

from rankloss_features import Features
from rankloss_features.checking import report
from rankloss_features.data import Data, Sample, Shards
from rankloss_features.folder import NAMES, read_about, write_about
from rankloss_features.teachers import Encoder, Teacher
from rankloss_open_clip.arguments import HOST as OPEN_CLIP
from rankloss_trainers import catalog
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Runtime
from rankloss_trainers.sentence_transformers import ContrastiveLoss


class Place(NamedTuple):
    """A folder, its data, the folder of another data set, and the readers of folders."""

    whole: Path
    data: Data
    other: Path
    readers: dict[str, Callable[[str], Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("folders")
    data = data_of("csv", folder / "data")
    written(folder / "whole", data, teacher())
    (folder / "others").mkdir()
    others = csv_data(table(folder / "others", order=[*range(1, ROWS), 0]))
    written(folder / "other", others, teacher(weights="1"))
    model, clip = tiny_sentences.tiny(folder), tiny_transformers.clip()

    def open_clip(path: str) -> None:
        Runtime(OPEN_CLIP, catalog.choose("rankclip"), RunOptions(teacher=path))

    def hugging_face(path: str) -> None:
        tiny_transformers.trainer(folder, model=clip, loss="rankclip", teacher=path)

    readers = {
        "open_clip": open_clip,
        "Hugging Face": hugging_face,
        "sentence-transformers": lambda path: ContrastiveLoss(model, "rankclip", teacher=path),
        "--check": lambda path: report(path, data),
    }
    return Place(folder / "whole", data, folder / "other", readers)


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

    return on("features.json", damage)


def reversed_rows(*names: str) -> Change:
    return lambda folder, other: [array_of(name, lambda x: x[::-1])(folder, other) for name in names]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


ARRAYS = [f"{name}.npy" for name in NAMES]
ANY = {
    "empty": lambda _: b"",
    "cut in its beginning": lambda x: x[:70],
    "cut at its end": lambda x: x[:-9],
    "zeros": lambda x: bytes(len(x)),
    "a flipped bit": flipped,
}
ARRAY = {
    "of zeros": np.zeros_like,
    "reversed": lambda x: x[::-1],
    "of another type": lambda x: x.astype(np.float64),
    "of objects": lambda x: x.astype(object),
    "of fewer rows": lambda x: x[:-1],
}
FILES = ["features.json", *ARRAYS, "pairs.npy", "rows.npy"]
DAMAGES: dict[str, Change] = {
    **{f"{file}, missing": (lambda folder, _, file=file: (folder / file).unlink()) for file in FILES},
    **{f"{file}, {kind}": on(file, change) for file in FILES for kind, change in ANY.items()},
    **{f"{file}, {kind}": array_of(file, change) for file in FILES[1:] for kind, change in ARRAY.items()},
    **{f"{file} of another data set": of_the_other(file) for file in FILES},
    "a list for entries": on("features.json", lambda _: b"[]"),
    "an entry missing": entries(lambda about: about.pop("teacher")),
    "an entry changed": entries(lambda about: about.update(rows=ROWS - 1)),
    "an entry as text": entries(lambda about: about.update(rows=str(ROWS))),
    "arrays reversed, and their hashes": reversed_rows(*ARRAYS, "rows.npy"),
    "all reversed": reversed_rows(*ARRAYS, "rows.npy", "pairs.npy"),
    "pairs of another data set": of_the_other("pairs.npy", "rows.npy"),
    "arrays of another data set": of_the_other(*ARRAYS, "pairs.npy", "rows.npy"),
}


def refused(read: Callable[[str], Any], folder: Path) -> bool:
    """Refusal by an error that names the folder."""
    try:
        read(str(folder))
    except ValueError as error:
        return str(folder) in str(error)
    return False


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_its_command_mends_or_refuses_it(
    place: Place, tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(place.whole, tmp_path / "damaged"))
    DAMAGES[damage](folder, place.other)
    for name, read in place.readers.items():
        assert refused(read, folder), name
    if not refused(lambda path: written(Path(path), place.data, teacher()), folder):
        assert files(folder) == files(place.whole)
        for read in place.readers.values():
            read(str(folder))


def test_folders_that_are_older_or_unfinished_say_what_to_do(place: Place, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.whole, tmp_path / "x"))
    command = "rm -rf ~ #\x1b[2J"
    write_about(folder, {**(read_about(folder) or {}), "complete": False, "command": command})
    for read in place.readers.values():
        with pytest.raises(ValueError, match=r"anyone may have written, .*'rm -rf ~ #\\x1b\[2J'"):
            read(str(folder))
    with pytest.raises(ValueError, match=r"account, its command was 'rm -rf ~ #\\x1b\[2J'"):
        written(folder, place.data, teacher(), batch_size=4)
    entries(lambda about: about.pop("format"))(folder, folder)
    for read in (*place.readers.values(), lambda path: written(Path(path), place.data, teacher())):
        with pytest.raises(ValueError, match=r"renew the folder, delete it and give its command again"):
            read(str(folder))


# --- faults while it is written ---------------------------------------------------------------------------

CALLS = {"open", "write", "flush", "truncate", "posix_fallocate", "fsync", "replace", "unlink"}
SIZE = 700  # bytes of the largest file, about
FAULTS = st.one_of(
    st.tuples(st.just("full"), st.integers(0, SIZE)),
    st.tuples(st.just("killed"), st.integers(0, 150)),
    st.tuples(st.just("second"), st.integers(0, 9)),
)


def disturbed(output: Path, data: Data, fault: str, at: int) -> None:
    """Write a folder until the disk is full or the process killed, or while another process tries to."""
    calls = count()

    def killing(_: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in CALLS and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def second(_: str, features: Tensor) -> Tensor:
        if fault == "second" and next(calls) == at:
            assert in_process(refused_as_locked, output, data) == 0
        return features

    if fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    if fault == "killed":
        sys.setprofile(killing)
    written(output, data, teacher(second))


def refused_as_locked(output: Path, data: Data) -> None:
    with pytest.raises(ValueError, match=r"written by 'process \d+ on .+ since .+'"):
        written(output, data, teacher())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    data = data_of("webdataset", folder / "data")
    written(folder / "whole", data, teacher())
    return data, folder / "whole"


@settings(max_examples=4)
@given(st.booleans(), st.lists(FAULTS, min_size=1, max_size=3))
@example(False, [("full", 0), ("full", 130), ("full", 610)])
@example(False, [("second", 2), ("killed", 40)])
@example(True, [("full", 300), ("killed", 50), ("killed", 60)])
def test_faults_leave_a_folder_that_is_refused_or_whole(
    undisturbed: tuple[Data, Path], is_mended: bool, faults: list[tuple[str, int]]
) -> None:
    data, whole = undisturbed[0], files(undisturbed[1])
    with tempfile.TemporaryDirectory() as place:
        output = Path(place, "output")
        if is_mended:
            shutil.copytree(undisturbed[1], output)
            on_damaged_row(output)
        for fault, at in faults:
            assert in_process(disturbed, output, data, fault, at) in (0, 1, -signal.SIGKILL)
            try:
                Features(str(output)).check()
            except ValueError:
                continue
            assert files(output) == whole
        written(output, data, teacher()).check()
        assert files(output) == whole


# --- links, and files that are mapped ---------------------------------------------------------------------


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("is_written", [True, False])
def test_nothing_is_written_through_a_link(place: Place, tmp_path: Path, link: Any, is_written: bool) -> None:
    """All files of a folder are links, or those that the command writes before they take their names."""
    folder = Path(shutil.copytree(place.whole, tmp_path / "folder"))
    (tmp_path / "elsewhere").mkdir()
    for name in [*(FILES if is_written else ["rows.npy"]), *(f".{x}" for x in FILES), ".holder", "..holder"]:
        kept, original = tmp_path / "elsewhere" / name, place.whole / name.lstrip(".")
        if name.lstrip(".") in (*ARRAYS, "rows.npy"):  # whose rows are all to be computed
            np.save(kept, np.zeros_like(np.load(original)))
        else:
            kept.write_bytes(original.read_bytes() if original.exists() else b"mine")
        (folder / name).unlink(missing_ok=True)
        link(kept, folder / name)
    before = {file.name: file.read_bytes() for file in (tmp_path / "elsewhere").iterdir()}
    written(folder, place.data, teacher()).check()
    assert files(folder) == files(place.whole)
    assert {file.name: file.read_bytes() for file in (tmp_path / "elsewhere").iterdir()} == before


def test_an_output_that_is_no_folder_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"--output .*x is no folder, nor a link to one that is there"):
        written(tmp_path / "x", place.data, teacher())


def test_what_a_training_has_mapped_is_not_changed(place: Place, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.whole, tmp_path / "folder"))
    mapped = on_damaged_row(folder)
    before = {name: x.copy() for name, x in mapped.arrays.items()}
    written(folder, place.data, teacher()).check()
    assert files(folder) == files(place.whole)
    for name, x in mapped.arrays.items():
        np.testing.assert_array_equal(x, before[name])


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
    (tmp_path / "x/components.npz").write_bytes(b"of an earlier release")
    rows = np.concatenate([x[features.present(slice(None))] for x in features.arrays.values()]).astype(
        np.float64
    )
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


def test_folders_without_such_components_are_refused(tmp_path: Path, place: Place) -> None:
    features = written(tmp_path / "x", place.data, spread((ROWS + 5,) * 2))
    features.components(ROWS)
    for width in (ROWS + 1, 0):
        with pytest.raises(ValueError, match=f"{ROWS + 5} dimensions and the {ROWS} rows .*; got {width}"):
            features.components(width)
    features = on_damaged_row(tmp_path / "x")
    with pytest.raises(ValueError, match=r"row \d .* not as it was written"):
        features.components(KEPT)
    for widths in ((WIDTH, WIDTH), (WIDTH, 4)):
        features = written(tmp_path / f"{widths}", place.data, spread(widths, spaces="separate"))
        with pytest.raises(ValueError, match=r"separate spaces.*--loss rankclip-distill"):
            features.components(4)
