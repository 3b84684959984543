"""The folder is written whole, or a clear error says why, and the same command goes on."""

from __future__ import annotations

import io
import re
import shutil
import socket
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teacher import (
    BATCH,
    CAPTIONS,
    ROWS,
    WIDTH,
    add,
    csv_data,
    data_of,
    files,
    forks,
    in_process,
    killed_at,
    letters,
    pixels_of,
    projection,
    shards,
    table,
    teacher,
    written,
)
from torch import Tensor

from rankloss_features import Features, writing
from rankloss_features.data import Shards
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Encoder, Teacher

KINDS = ("csv", "webdataset")


@pytest.mark.parametrize("is_older", [False, True])
def test_only_rows_that_do_not_fit_are_computed_again(
    tmp_path: Path, is_older: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In an unfinished folder, which earlier releases wrote under the files' own names."""
    data, output, calls = data_of("csv", tmp_path), tmp_path / "output", []
    monkeypatch.setattr(writing, "_ESTIMATED", 0.0)

    def count(_: str, features: Tensor) -> Tensor:
        calls.append(len(features))
        return features

    assert killed_at(3, output, data) == -9
    with pytest.raises(ValueError, match="unfinished"):
        Features(str(output))
    images = np.load(output / ".image_features.npy", mmap_mode="r+")
    images[1, 2:] = 0  # a page that never reached the disk
    images.flush()
    for draft in output.glob(".*.npy") if is_older else ():
        draft.rename(output / draft.name[1:])
    for left in (ROWS - BATCH, 0):  # of two batches that were done, one is damaged
        written(output, data, teacher(count)).check()
        assert sum(calls) == 2 * left
        calls.clear()
        said = capsys.readouterr().err
        assert said.count("about 00:0") == (left > 0)
        assert said.count("left; 40 rows will take 0.0 MB") == (left > 0)


def test_picture_of_several_captions_is_opened_and_encoded_once_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are those of a batch in which each row has a picture of its own."""
    lines = table(tmp_path).read_text().splitlines()
    pictures = [line.partition("\t")[0] for line in lines[1:]]
    shared = [f"{pictures[i // 3]}\t{caption}" for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "shared.csv").write_text("\n".join([lines[0], *shared]) + "\n")
    encoded = dict.fromkeys(NAMES, 0)

    def count(name: str, features: Tensor) -> Tensor:
        encoded[name] += len(features)
        return features

    opened = Mock(wraps=Image.open)
    monkeypatch.setattr(Image, "open", opened)
    found = written(tmp_path / "shared", csv_data(tmp_path / "shared.csv"), teacher(count), batch_size=ROWS)
    assert encoded == {NAMES[0]: -(-ROWS // 3), NAMES[1]: ROWS}
    assert opened.call_count == encoded[NAMES[0]]
    single = written(tmp_path / "single", csv_data(tmp_path / "pairs.csv"), teacher(), batch_size=ROWS)
    rows = np.arange(ROWS)
    features, of_pictures = found.check().take(rows), single.take(rows // 3)
    np.testing.assert_allclose(features[NAMES[0]], of_pictures[NAMES[0]], atol=1e-3)
    np.testing.assert_array_equal(features[NAMES[1]], single.take(rows)[NAMES[1]])


def write_as(rank: int, port: int, *args: Any) -> Any:
    group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = forks.Process(target=in_process, args=(written, *args), kwargs=group)
    process.start()
    return process


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_what_one_does(tmp_path: Path, kind: str) -> None:
    data = data_of(kind, tmp_path / "data")
    written(tmp_path / "one", data, teacher())
    assert killed_at(2, tmp_path / "two", data) == -9
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [write_as(rank, port, tmp_path / "two", data, teacher()) for rank in range(2)]
    for process in processes:
        process.join()
    assert files(tmp_path / "two") == files(tmp_path / "one")
    Features(str(tmp_path / "two")).check()


# --- bad input --------------------------------------------------------------------------------------------

ORDER = [1, 0, *range(2, ROWS)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose writing was killed."""
    folder = tmp_path_factory.mktemp("begun")
    assert killed_at(3, folder / "output", data_of("csv", folder)) == -9
    return folder / "output"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": {"weights": "1"}}, "another teacher"),
        ({"dtype": "float32"}, "another dtype, float16"),
        ({"batch_size": 16}, "another batch_size, 8"),
        ({"order": ORDER}, "row 0"),
        ({"captions": [*CAPTIONS[:17], "another", *CAPTIONS[18:]]}, "row 17"),
        ({"captions": CAPTIONS[:-1]}, "40 rows, .* has 39: row 39 is missing"),
    ],
)
def test_resumed_with_something_else_is_an_error_and_loses_nothing(
    begun: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    output = shutil.copytree(begun, tmp_path / "output")
    before = files(output)
    (tmp_path / "other").mkdir()
    other = csv_data(table(tmp_path / "other", changed.pop("captions", None), changed.pop("order", None)))
    with pytest.raises(ValueError, match=message):
        written(output, other, teacher(**changed.pop("teacher", {})), **changed)
    assert files(output) == before
    # Pictures may move; the pairs stay.
    (tmp_path / "moved").mkdir()
    written(output, csv_data(table(tmp_path / "moved")), teacher()).check()


def test_rows_of_another_teacher_are_not_taken_up(begun: Path, tmp_path: Path) -> None:
    """Where the files were deleted, but those whose names begin with a dot."""
    output, data = shutil.copytree(begun, tmp_path / "output"), data_of("csv", tmp_path / "data")
    for file in output.glob("[!.]*"):
        file.unlink()
    assert (output / ".rows.npy").exists()
    other = teacher(lambda _, features: features.flip(-1), weights="1")
    assert files(Path(written(output, data, other).path)) == files(
        Path(written(tmp_path / "x", data, other).path)
    )


def spoilt(row: int | slice, value: float) -> Any:
    def change(name: str, features: Tensor) -> Tensor:
        if name == NAMES[1]:
            features = features.clone()
            features[row] = value
        return features

    return teacher(change)


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [(3, torch.nan, "text_features.*row 3"), (2, 0.0, "zeros.*row 2"), (slice(None), 1.0, "one row")],
)
def test_what_no_teacher_gives_is_refused(tmp_path: Path, row: Any, value: float, message: str) -> None:
    data = data_of("csv", tmp_path)
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "output", data, spoilt(row, value))
    written(tmp_path / "output", data, teacher()).check()


def test_one_caption_for_a_batch_is_no_constant_teacher(tmp_path: Path) -> None:
    written(tmp_path / "output", data_of("csv", tmp_path, ["one class"] * 20 + CAPTIONS), teacher()).check()


def test_picture_that_cannot_be_read(tmp_path: Path) -> None:
    file = table(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"row 5: .*'5\.png'"):
        written(tmp_path / "csv", csv_data(file), teacher())
    # The trainer skips such samples of a webdataset.
    features = written(tmp_path / "wds", Shards(shards(tmp_path, broken=(2, 5))), teacher()).check()
    assert features.about["skipped"] == 2
    with pytest.raises(ValueError, match=r"row 1 .*picture"):
        features.take(np.array([0, 1]))
    nothing = Shards(shards(tmp_path, broken=tuple(range(ROWS))))
    with pytest.raises(ValueError, match="none of 40 pictures"):
        written(tmp_path / "none", nothing, teacher())


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "image_features.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"features\.json"):
        written(tmp_path, data_of("csv", tmp_path / "data"), teacher())
    assert (tmp_path / "image_features.npy").read_bytes() == b"mine"


@pytest.mark.parametrize("rows", [1_500, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, rows: int) -> None:
    """Random pictures of 32 × 32 pixels. Pages of files, which the system takes back, are not counted."""
    noise = np.random.default_rng(0).integers(0, 256, (rows + 32) * 96, dtype=np.uint8)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(rows):
            pixels = noise[i * 96 : i * 96 + 3072].reshape(32, 32, 3)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=0)
            add(tar, f"{i:07}", png=file.getvalue(), txt=f"picture {i}".encode())
    seen = []

    def tiny(name: str, features: Tensor) -> Tensor:
        seen.append(
            int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
        )  # MiB
        return features

    encoders = {
        NAMES[0]: Encoder(
            pixels_of(8), lambda x: tiny("", x @ projection(NAMES[0])), WIDTH, needs_pictures=True
        ),
        NAMES[1]: Encoder(letters, lambda x: x @ projection(NAMES[1]), WIDTH),
    }
    data = Shards(str(tmp_path / "0.tar"))
    features = written(tmp_path / "output", data, Teacher({}, encoders), batch_size=64)
    assert len(features.check()) == rows
    assert len(seen) == -(-rows // 64)
    quarter = len(seen) // 4
    assert max(seen[-quarter:]) - max(seen[:quarter]) < 16
