"""The folder is written whole, or a clear error says why, and the same command goes on."""

from __future__ import annotations

import datetime
import errno
import io
import os
import re
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_teacher as tiny
import torch
from PIL import Image
from tiny_teacher import (
    CAPTIONS,
    ROWS,
    csv_data,
    data_of,
    files,
    flip,
    in_process,
    table,
    teacher,
    watched,
    written,
)
from torch import Tensor

from rankloss_features import Features, writing
from rankloss_features.data import Shards
from rankloss_features.folder import NAMES, write_array
from stored_features import stored


@pytest.fixture(scope="module", params=["csv", "webdataset"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Data, and their folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = data_of(request.param, folder / "data")
    written(folder / "whole", data, teacher())
    return data, folder / "whole"


# --- faults -----------------------------------------------------------------------------------------------

CALLS = {"open", "write", "flush", "fsync", "replace", "unlink"}


def disturbed(output: Path, data: Any, fault: int, at: int) -> None:
    """Write a folder until a call of the system fails, a file has so many bytes, or the process is killed."""
    calls = count()

    def failing(_: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in CALLS and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(_: int) -> None:
        if next(calls) == at:
            raise OSError(fault, os.strerror(fault))

    if fault == signal.SIGKILL:
        sys.setprofile(failing)
        written(output, data, teacher())
    elif fault == errno.EFBIG:
        sys.stderr = io.StringIO()  # pytest's is a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    else:
        os.fsync = fsync
    with pytest.raises(OSError, match=re.escape(f"{os.strerror(fault)}: {output}/")):
        written(output, data, teacher())


@pytest.mark.parametrize(
    "faults",
    [
        *([(errno.EFBIG, at)] * 2 for at in (0, 100, 260, 600)),
        [(errno.ENOSPC, 2), (errno.EDQUOT, 4), (errno.ENOSPC, 3)],
        *([(signal.SIGKILL, at), (signal.SIGKILL, at // 3)] for at in (3, 9, 20, 41, 62, 87)),
    ],
)
def test_faults_leave_a_folder_that_is_refused_or_whole_and_goes_on(
    undisturbed: tuple[Any, Path], tmp_path: Path, faults: list[tuple[int, int]]
) -> None:
    """A new folder of a CSV file, and a damaged one of a webdataset."""
    (data, whole), output = undisturbed, tmp_path / "output"
    if data.is_stream:
        shutil.copytree(whole, output)
        for shard in range(4):
            flip(output / f"text_features-{shard:05}.npy")
    for fault, at in faults:
        assert in_process(disturbed, output, data, fault, at) == (-fault if fault == signal.SIGKILL else 0)
        with suppress(ValueError):
            Features(str(output)).check()
            found = files(output).items()
            assert {x: content for x, content in found if not x.startswith((".", "shard-"))} == files(whole)
    written(output, data, teacher())
    assert files(output) == files(whole)


def test_only_missing_or_damaged_shards_are_computed(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    (data, whole), output, calls = undisturbed, tmp_path / "output", list[int]()
    tiny.killed_at(6, output, data)
    begun = sorted(output.glob("*features-*.npy"))
    assert len(begun) == 4
    flip(begun[0])
    for left in (ROWS - tiny.SHARD, 0):
        written(output, data, teacher(watched(calls))).check()
        assert sum(calls) == left
        assert files(output) == files(whole)
        calls.clear()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link_or_under_a_training(
    undisturbed: tuple[Any, Path], tmp_path: Path, link: Any
) -> None:
    """Every file of a folder is a link, and every name under which it is written; the folder is mapped."""
    (data, whole), elsewhere = undisturbed, tmp_path / "elsewhere"
    folder = Path(shutil.copytree(whole, tmp_path / "folder"))
    elsewhere.mkdir()
    for name in [*files(whole), "shard-00001.json"]:
        for linked in (name, f".{name}"):
            original = whole / name
            (elsewhere / linked).write_bytes(original.read_bytes() if original.exists() else b"{}")
            (folder / linked).unlink(missing_ok=True)
            link(elsewhere / linked, folder / linked)
    flip(elsewhere / "image_features-00001.npy")
    before, mapped = files(elsewhere), Features(str(folder)).arrays[NAMES[0]]
    rows = mapped[:]
    written(folder, data, teacher()).check()
    left = {name: content for name, content in files(folder).items() if not name.startswith(".")}
    assert left == files(whole)
    assert files(elsewhere) == before
    np.testing.assert_array_equal(mapped[:], rows)


# --- several processes ------------------------------------------------------------------------------------


def test_the_processes_of_torchrun_write_what_one_does(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    (data, whole), output = undisturbed, tmp_path / "two"
    tiny.killed_at(3, output, data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    given = (written, output, data, teacher())
    ranks = [{"RANK": str(rank), **group} for rank in range(2)]
    processes = [tiny.forks.Process(target=in_process, args=given, kwargs=rank) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert files(output) == files(whole)


def alone_under_torchrun(output: Path, data: Any, errors: Any) -> None:
    """The command, started by the first process of a training whose others go on training."""
    writing.JOINED_WITHIN = datetime.timedelta(seconds=2)
    try:
        written(output, data, teacher())
    except ConnectionError as error:
        errors.put(str(error))


@pytest.mark.parametrize("has_store", [True, False])
def test_a_process_of_torchrun_whose_companions_never_come_ends_with_an_error(
    undisturbed: tuple[Any, Path], tmp_path: Path, has_store: bool
) -> None:
    """The address is the training's own, whose first process may serve there already."""
    data, _ = undisturbed
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True) if has_store else None
    errors = tiny.forks.Queue()
    given = (alone_under_torchrun, tmp_path / "x", data, errors)
    process = tiny.forks.Process(target=in_process, args=given, kwargs=group)
    process.start()
    error = errors.get(timeout=60)
    process.join()
    assert re.search(
        "RANK=0 and WORLD_SIZE=2 .* not all 2 processes began .* unset RANK and WORLD_SIZE", error
    )
    assert not (tmp_path / "x").exists()
    del store


def test_a_second_writer_waits_and_finds_the_folder(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    (data, whole), output = undisturbed, tmp_path / "output"
    said, go = tiny.forks.Queue(), tiny.forks.Event()

    def wait(_: str, features: Tensor) -> Tensor:
        assert go.wait(60)
        return features

    def second() -> None:
        def warn(text: str, *more: Any) -> None:
            said.put(text % more)
            go.set()

        writing._logger.warning = warn  # type: ignore[method-assign, assignment]
        calls: list[int] = []
        written(output, data, teacher(watched(calls)))
        said.put(calls)

    first = tiny.forks.Process(target=in_process, args=(written, output, data, teacher(wait)))
    first.start()
    while not (output / "pairs.npy").exists():
        assert first.is_alive()
    assert in_process(second) == 0
    first.join()
    assert str(output) in said.get(timeout=10)
    assert said.get(timeout=10) == []
    assert files(output) == files(whole)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose writing was killed."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.killed_at(3, folder / "output", data_of("csv", folder))
    return folder / "output"


@pytest.mark.parametrize(
    ("captions", "changed", "message"),
    [
        (CAPTIONS, {"weights": "1"}, "begun with another teacher, .*'0'.* not .*'1'"),
        (CAPTIONS, {"dtype": "float32"}, "begun with another dtype, float16, not float32"),
        ([CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]], {}, "row 0"),
        ([*CAPTIONS[:17], "another", *CAPTIONS[18:]], {}, "row 17"),
        (CAPTIONS[:-1], {}, "40 rows, .* has 39: row 39 is missing"),
    ],
)
def test_resumed_with_something_else_is_an_error_and_loses_nothing(
    begun: Path, tmp_path: Path, captions: list[str], changed: dict[str, Any], message: str
) -> None:
    output, other = shutil.copytree(begun, tmp_path / "output"), data_of("csv", tmp_path / "other", captions)
    before, weights = files(output), changed.get("weights", "0")
    settings = {key: value for key, value in changed.items() if key != "weights"}
    with pytest.raises(ValueError, match=message):
        written(output, other, teacher(weights=weights), **settings)
    assert files(output) == before


def test_pictures_may_move_and_shards_of_pairs_that_are_gone_are_not_taken_up(
    begun: Path, tmp_path: Path
) -> None:
    output, other = shutil.copytree(begun, tmp_path / "output"), data_of("csv", tmp_path, CAPTIONS[::-1])
    (output / "pairs.npy").unlink()
    written(output, other, teacher())
    written(tmp_path / "fresh", other, teacher())
    assert files(output) == files(tmp_path / "fresh")
    written(shutil.copytree(begun, tmp_path / "moved"), data_of("csv", tmp_path / "new"), teacher()).check()


def test_data_are_read_once_to_be_compared_with_stored_features(
    undisturbed: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = undisturbed
    pairs, readings = data.pairs, []

    def read() -> Iterator[Any]:
        readings.append("begins")  # with the first block
        yield from pairs()

    monkeypatch.setattr(data, "pairs", read)
    written(tmp_path / "output", data, replace(teacher(), rows=ROWS, stored=Features(str(folder))))
    assert readings == ["begins"]


def test_an_output_that_is_no_folder_of_the_command_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("nowhere")
    (tmp_path / "image_features.npy").write_bytes(b"mine")
    for output in (tmp_path / "x", tmp_path, tmp_path / "image_features.npy"):
        with pytest.raises(ValueError, match=f"--output {output} "):
            written(output, data_of("csv", tmp_path / "data"), teacher())
    assert (tmp_path / "image_features.npy").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (3, torch.nan, "text_features, counted from row 0, must be finite; row 3"),
        (2, 0.0, "text_features, counted from row 0, must not have rows of zeros.* row 2"),
        (slice(None), 1.0, f"text_features must not be one row {ROWS + 20} times"),
    ],
)
def test_what_no_teacher_gives_is_refused(tmp_path: Path, row: Any, value: float, message: str) -> None:
    def spoil(name: str, features: Tensor) -> Tensor:
        features = features.clone()
        features[row] = value if name == NAMES[1] else features[row]
        return features

    # Neighbours of one caption have one row of any teacher.
    data = data_of("csv", tmp_path, CAPTIONS + ["one class"] * 20)
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "output", data, teacher(spoil))
    written(tmp_path / "other", data, teacher()).check()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_features_whose_squares_float32_cannot_hold_are_divided_by_their_norms(
    tmp_path: Path, scale: float
) -> None:
    data = data_of("csv", tmp_path)
    wanted = written(tmp_path / "plain", data, teacher())
    scaled = written(tmp_path / "scaled", data, teacher(lambda _, features: features * scale))
    for name in NAMES:
        np.testing.assert_allclose(scaled.arrays[name][:], wanted.arrays[name][:], atol=1e-3)  # float16


def test_a_folder_that_holds_one_row_is_neither_finished_nor_opened(tmp_path: Path) -> None:
    """Rows of zeros, without a picture, are none."""
    rows = np.ones((9, 4), np.float16)
    rows[2] = 0
    with pytest.raises(ValueError, match="the teacher's text_features must not be one row 8 times"):
        stored(tmp_path / "x", text_features=rows)
    differing = rows.copy()
    differing[8, 0] = 2
    path = stored(tmp_path / "y", text_features=differing)
    Features(path)
    write_array(tmp_path / "y/text_features-00000.npy", rows)
    with pytest.raises(ValueError, match=f"text_features of {path} must not be one row 8 times"):
        Features(path)


def test_picture_that_cannot_be_read(tmp_path: Path) -> None:
    file = table(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"row 5: .*'5\.png'"):
        written(tmp_path / "csv", csv_data(file), teacher())
    # The trainer skips such samples of a webdataset.
    features = written(tmp_path / "wds", Shards(tiny.shards(tmp_path, broken=(2, 5))), teacher()).check()
    assert features.about["skipped"] == 2
    with pytest.raises(ValueError, match=r"row 1 .*picture"):
        features.take(np.array([0, 1]))
    nothing = Shards(tiny.shards(tmp_path, broken=tuple(range(ROWS))))
    with pytest.raises(ValueError, match=f"none of {ROWS} pictures can be read"):
        written(tmp_path / "none", nothing, teacher())


# --- how rows are computed --------------------------------------------------------------------------------


def test_a_picture_of_several_captions_is_opened_and_encoded_once_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are those of a batch in which each row has a picture of its own."""
    single = written(tmp_path / "single", csv_data(file := table(tmp_path)), teacher(), batch_size=ROWS)
    shared = [f"{tmp_path}/{i // 3}.png\t{caption}" for i, caption in enumerate(CAPTIONS)]
    file.write_text("\n".join(["filepath\ttitle", *shared]))
    opened, calls = Mock(wraps=Image.open), list[int]()
    monkeypatch.setattr(Image, "open", opened)
    features = written(tmp_path / "shared", csv_data(file), teacher(watched(calls)), batch_size=ROWS).check()
    assert sum(calls) == opened.call_count == -(-ROWS // 3)
    rows = np.arange(ROWS)
    found, of_pictures = features.take(rows), single.take(rows // 3)
    np.testing.assert_allclose(found[NAMES[0]], of_pictures[NAMES[0]], atol=1e-3)
    np.testing.assert_array_equal(found[NAMES[1]], single.take(rows)[NAMES[1]])


def test_batches_end_with_their_shard_and_their_source(tmp_path: Path) -> None:
    """In shards of 12 rows and batches of 8; of one file, and of three with 14, 13 and 13 rows."""
    for data, ends in (
        (csv_data(table(tmp_path)), [8, 12, 20, 24, 32, 36, 40]),
        (Shards(tiny.shards(tmp_path, number=3)), [8, 12, 14, 22, 24, 27, 35, 36, 40]),
    ):
        calls: list[int] = []
        written(tmp_path / f"{len(ends)}", data, teacher(watched(calls, NAMES[1]))).check()
        assert np.cumsum(calls).tolist() == ends


def test_small_data_have_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 65_536)
    assert [*map(writing.size_of_shards, (40, 70_000, 10**6, 10**8))] == [4096, 4375, 62_500, 65_536]


@pytest.mark.parametrize("rows", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of files, which the system takes back, are not counted."""
    monkeypatch.setattr(writing, "SHARD_ROWS", 2**15)
    table(tmp_path)
    lines = [f"{tmp_path}/{i % ROWS}.png\tpicture {i}" for i in range(rows)]
    (tmp_path / "many.csv").write_text("\n".join(["filepath\ttitle", *lines]))

    def measure(name: str, features: Tensor) -> Tensor:
        status = Path("/proc/self/status").read_text()
        seen.append(int(re.search(r"RssAnon:\s*(\d+)", status)[1]) // 1024)  # MiB
        return features

    seen: list[int] = []
    data = csv_data(tmp_path / "many.csv")
    assert len(written(tmp_path / "output", data, teacher(measure), batch_size=64).check()) == rows
    quarter = len(seen) // 4
    assert max(seen[-quarter:]) - max(seen[:quarter]) < 16
