"""The folder is written whole, or a clear error says why, and the same command goes on."""

from __future__ import annotations

import datetime
import errno
import io
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
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
    contents_of_files,
    csv_data,
    csv_table,
    data_of,
    flip_a_bit,
    in_process,
    record_batch_sizes,
    teacher,
    write_features,
)
from torch import Tensor

from rankloss_features import Features, writing
from rankloss_features.data import Shards
from rankloss_features.folder import NAMES, write_array
from stored_features import features_folder


@pytest.fixture(scope="module", params=["csv", "webdataset"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Data, and the folder of their features as it is written without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = data_of(request.param, folder / "data")
    write_features(folder / "whole", data, teacher())
    return data, folder / "whole"


# --- faults -----------------------------------------------------------------------------------------------


def limit_size_of_files(size: int) -> None:
    """Let every file of this process that grows beyond a size be an error."""
    sys.stderr = io.StringIO()  # pytest's is a file, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fail_at_fsync(error: int, at: int) -> None:
    """Let a file fail to be brought to the disk; the others are left to the system."""
    calls = count()

    def fail(_: int) -> None:
        if next(calls) == at:
            raise OSError(error, os.strerror(error))

    os.fsync = fail


def write_disturbed(output: Path, data: Any, fault: int, at: int) -> None:
    """Write a folder in a process that is killed, or in which an error names the folder.

    Args:
        output: The folder.
        data: The pairs.
        fault: The signal that kills, or the number of the error.
        at: The call at which it comes, as for :func:`tiny_teacher.kill_at_call` or :func:`fail_at_fsync`, or
            the size of a file from which it does.
    """
    if fault == signal.SIGKILL:
        tiny.kill_at_call(at)
    elif fault == errno.EFBIG:
        limit_size_of_files(at)
    else:
        fail_at_fsync(fault, at)
    with pytest.raises(OSError, match=re.escape(f"{os.strerror(fault)}: {output}/")):
        write_features(output, data, teacher())


# Calls are spread over the 145 of a new folder, and the 132 of a damaged one. In a new one 5, 12 and 126 find
# folder.json, pairs.npy and the last folder.json open and empty; in a damaged one 113 finds the last so.
# Sizes are spread over those of the files: an array's header takes 128 bytes, a shard of features 144 more.
FAULTS = {
    **{f"twice no file above {size} bytes": [(errno.EFBIG, size)] * 2 for size in (0, 100, 260, 600)},
    "thrice a full disk": [(errno.ENOSPC, 2), (errno.EDQUOT, 4), (errno.ENOSPC, 3)],
    **{
        f"killed at call {call} and at a third of it": [(signal.SIGKILL, call), (signal.SIGKILL, call // 3)]
        for call in (5, 12, 20, 41, 62, 87)
    },
    **{f"killed at call {call}": [(signal.SIGKILL, call)] for call in (113, 126)},
}
"""Faults of commands one after another, as :func:`write_disturbed` takes them."""


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_leave_a_folder_that_is_refused_or_whole_and_goes_on(
    undisturbed: tuple[Any, Path], tmp_path: Path, faults: list[tuple[int, int]]
) -> None:
    """A new folder of a CSV file, and a damaged one of a webdataset."""
    (data, whole), output = undisturbed, tmp_path / "output"
    if data.is_stream:
        shutil.copytree(whole, output)
        for shard in range(math.ceil(ROWS / tiny.SHARD)):
            flip_a_bit(output / f"text_features-{shard:05}.npy")
    for fault, at in faults:
        # A kill ends the process; of an error the process itself has checked that it names the folder.
        expected = -signal.SIGKILL if fault == signal.SIGKILL else 0
        assert in_process(write_disturbed, output, data, fault, at) == expected
        with suppress(ValueError):  # the folder is refused
            Features(str(output)).check()
            # Without files that were being written, and the marks of shards.
            finished = {
                name: content
                for name, content in contents_of_files(output).items()
                if not name.startswith((".", "shard-"))
            }
            assert finished == contents_of_files(whole)
    write_features(output, data, teacher())
    assert contents_of_files(output) == contents_of_files(whole)


def test_only_missing_or_damaged_shards_are_computed(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    (data, whole), output = undisturbed, tmp_path / "output"
    tiny.write_killed_in_batch(6, output, data)  # a shard has two batches: in the second of the third shard
    written_shards = sorted(output.glob("*features-*.npy"))
    assert len(written_shards) == 2 * len(NAMES)  # two shards are on the disk, of which one is damaged now
    flip_a_bit(written_shards[0])
    # The first command keeps the shard that is whole; the second has nothing to do.
    for missing in (ROWS - tiny.SHARD, 0):
        rows_of_batches: list[int] = []
        write_features(output, data, teacher(record_batch_sizes(rows_of_batches))).check()
        assert sum(rows_of_batches) == missing
        assert contents_of_files(output) == contents_of_files(whole)


def link_every_file(whole: Path, folder: Path, elsewhere: Path, link: Any) -> None:
    """Make a folder like a whole one, of links to files elsewhere.

    Of every file the hidden name, under which it is written before it is renamed, is a link, too; so are the
    names of a shard's mark.
    """
    folder.mkdir()
    elsewhere.mkdir()
    contents = {**contents_of_files(whole), "shard-00001.json": b"{}"}
    for name, content in contents.items():
        for linked in (name, f".{name}"):
            (elsewhere / linked).write_bytes(content)
            link(elsewhere / linked, folder / linked)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link_or_under_a_training(
    undisturbed: tuple[Any, Path], tmp_path: Path, link: Any
) -> None:
    """One file is damaged; a training has mapped the folder, as it was before it is written again."""
    (data, whole), folder, elsewhere = undisturbed, tmp_path / "folder", tmp_path / "elsewhere"
    link_every_file(whole, folder, elsewhere, link)
    flip_a_bit(elsewhere / "image_features-00001.npy")
    before, mapped = contents_of_files(elsewhere), Features(str(folder)).arrays[NAMES[0]]
    rows = mapped[:]
    write_features(folder, data, teacher()).check()
    finished = {
        name: content for name, content in contents_of_files(folder).items() if not name.startswith(".")
    }
    assert finished == contents_of_files(whole)
    assert contents_of_files(elsewhere) == before
    np.testing.assert_array_equal(mapped[:], rows)


# --- several processes ------------------------------------------------------------------------------------


def test_the_processes_of_torchrun_write_what_one_does(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    (data, whole), output = undisturbed, tmp_path / "two"
    tiny.write_killed_in_batch(3, output, data)
    tiny.under_torchrun(writing.write, output, data, teacher(), tiny.SETTINGS, 0)
    assert contents_of_files(output) == contents_of_files(whole)


def write_alone_under_torchrun(output: Path, data: Any, errors: Any) -> None:
    """Write in the first process of a training whose others go on training; the error goes into a queue."""
    writing.JOINED_WITHIN = datetime.timedelta(seconds=2)
    try:
        write_features(output, data, teacher())
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
    process = tiny.started(write_alone_under_torchrun, tmp_path / "x", data, errors, **group)
    error = errors.get(timeout=60)
    process.join()
    del store  # which has served until here
    words = "RANK=0 and WORLD_SIZE=2 .* not all 2 processes began .* unset RANK and WORLD_SIZE"
    assert re.search(words, error)
    assert not (tmp_path / "x").exists()


def wait_for(file: Path, process: Any) -> None:
    """Wait until a process has written a file; it must not end before."""
    while not file.exists():
        assert process.is_alive()
        time.sleep(0.01)


def test_a_second_writer_waits_and_finds_the_folder(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    """The first goes on once the second has warned that it waits; the second encodes nothing."""
    (data, whole), output = undisturbed, tmp_path / "output"
    warnings, batches, go_on = tiny.forks.Queue(), tiny.forks.Queue(), tiny.forks.Event()

    def stall(_: str, features: Tensor) -> Tensor:
        """Let the first wait in its first batch, while it holds the folder's lock, until it may go on."""
        assert go_on.wait(60)
        return features

    def write_as_the_second() -> None:
        """Write the same folder; its warnings and its batches go to this process, in queues."""

        def warn(text: str, *arguments: Any) -> None:
            """In place of the logger's: the second is known to wait, so the first may go on."""
            warnings.put(text % arguments)
            go_on.set()

        writing._logger.warning = warn  # type: ignore[method-assign, assignment]
        rows_of_batches: list[int] = []
        write_features(output, data, teacher(record_batch_sizes(rows_of_batches)))
        batches.put(rows_of_batches)

    first = tiny.started(write_features, output, data, teacher(stall))
    wait_for(output / "pairs.npy", first)  # the first holds the lock once it has begun the folder
    assert in_process(write_as_the_second) == 0
    first.join()
    assert first.exitcode == 0
    assert str(output) in warnings.get(timeout=10)
    assert batches.get(timeout=10) == []  # of the second
    assert contents_of_files(output) == contents_of_files(whole)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose writing was killed."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.write_killed_in_batch(3, folder / "output", data_of("csv", folder))
    return folder / "output"


@pytest.mark.parametrize(
    ("captions", "weights", "dtype", "message"),
    [
        (CAPTIONS, "1", "float16", "begun with another teacher, .*'0'.* not .*'1'"),
        (CAPTIONS, "0", "float32", "begun with another dtype, float16, not float32"),
        ([CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]], "0", "float16", "row 0"),
        ([*CAPTIONS[:17], "another", *CAPTIONS[18:]], "0", "float16", "row 17"),
        (CAPTIONS[:-1], "0", "float16", "40 rows, .* has 39: row 39 is missing"),
    ],
    ids=["another teacher", "another dtype", "two captions exchanged", "another caption", "a pair too few"],
)
def test_going_on_with_something_else_is_an_error_and_loses_nothing(
    begun: Path, tmp_path: Path, captions: list[str], weights: str, dtype: str, message: str
) -> None:
    output = shutil.copytree(begun, tmp_path / "output")
    data = data_of("csv", tmp_path / "other", captions)
    before = contents_of_files(output)
    with pytest.raises(ValueError, match=message):
        write_features(output, data, teacher(weights=weights), dtype=dtype)
    assert contents_of_files(output) == before


def test_pictures_may_move_before_a_folder_goes_on(begun: Path, tmp_path: Path) -> None:
    output = shutil.copytree(begun, tmp_path / "output")
    write_features(output, data_of("csv", tmp_path / "elsewhere"), teacher()).check()


def test_shards_of_pairs_that_are_gone_are_not_taken_up(begun: Path, tmp_path: Path) -> None:
    output, other = shutil.copytree(begun, tmp_path / "output"), data_of("csv", tmp_path, CAPTIONS[::-1])
    (output / "pairs.npy").unlink()
    write_features(output, other, teacher())
    write_features(tmp_path / "fresh", other, teacher())
    assert contents_of_files(output) == contents_of_files(tmp_path / "fresh")


def test_data_are_read_once_to_be_compared_with_stored_features(
    undisturbed: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = undisturbed
    pairs, readings = data.pairs, []

    def read() -> Iterator[Any]:
        readings.append("begins")  # with the first block
        yield from pairs()

    monkeypatch.setattr(data, "pairs", read)
    stored_teacher = replace(teacher(), rows=ROWS, stored=Features(str(folder)))
    write_features(tmp_path / "output", data, stored_teacher)
    assert readings == ["begins"]


def test_an_output_that_is_no_folder_of_the_command_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("nowhere")
    (tmp_path / "image_features.npy").write_bytes(b"mine")
    for output in (tmp_path / "x", tmp_path, tmp_path / "image_features.npy"):
        with pytest.raises(ValueError, match=f"--output {output} "):
            write_features(output, data_of("csv", tmp_path / "data"), teacher())
    assert (tmp_path / "image_features.npy").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("rows", "value", "message"),
    [
        (3, torch.nan, "text_features, counted from row 0, must be finite; row 3"),
        (2, 0.0, "text_features, counted from row 0, must not have rows of zeros.* row 2"),
        (slice(None), 1.0, f"text_features must not be one row {ROWS + 20} times"),
    ],
    ids=["NaN", "a row of zeros", "one row"],
)
def test_what_no_teacher_gives_is_refused(tmp_path: Path, rows: Any, value: float, message: str) -> None:
    def spoil(name: str, features: Tensor) -> Tensor:
        if name == NAMES[0]:
            return features
        spoilt = features.clone()
        spoilt[rows] = value
        return spoilt

    # Neighbours of one caption have one row of any teacher, which is no error: the second writing passes.
    data = data_of("csv", tmp_path, CAPTIONS + ["one class"] * 20)
    with pytest.raises(ValueError, match=message):
        write_features(tmp_path / "output", data, teacher(spoil))
    write_features(tmp_path / "other", data, teacher()).check()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_features_whose_squares_float32_cannot_hold_are_divided_by_their_norms(
    tmp_path: Path, scale: float
) -> None:
    data = data_of("csv", tmp_path)
    wanted = write_features(tmp_path / "plain", data, teacher())
    scaled = write_features(tmp_path / "scaled", data, teacher(lambda _, features: features * scale))
    for name in NAMES:
        np.testing.assert_allclose(scaled.arrays[name][:], wanted.arrays[name][:], atol=1e-3)  # float16


def one_row_and_zeros() -> np.ndarray:
    """Features of eight equal rows, and of a row of zeros, as where a picture could not be read."""
    rows = np.ones((9, 4), np.float16)
    rows[2] = 0
    return rows


def test_a_folder_that_holds_one_row_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the teacher's text_features must not be one row 8 times"):
        features_folder(tmp_path / "x", text_features=one_row_and_zeros())


def test_a_folder_that_holds_one_row_is_not_opened(tmp_path: Path) -> None:
    """It had another row when it was finished."""
    differing = one_row_and_zeros()
    differing[8, 0] = 2
    path = features_folder(tmp_path / "x", text_features=differing)
    Features(path)
    write_array(tmp_path / "x/text_features-00000.npy", one_row_and_zeros())
    with pytest.raises(ValueError, match=f"text_features of {path} must not be one row 8 times"):
        Features(path)


def test_a_picture_of_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = csv_table(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"row 5: .*'5\.png'"):
        write_features(tmp_path / "x", csv_data(file), teacher())


def test_a_sample_of_shards_without_a_readable_picture_has_no_features(tmp_path: Path) -> None:
    """As the trainer skips it. The first of two shards has the even samples: row 1 is the broken sample 2."""
    features = write_features(tmp_path / "x", Shards(tiny.shards(tmp_path, broken=(2, 5))), teacher()).check()
    assert features.about["skipped"] == 2
    with pytest.raises(ValueError, match=r"row 1 .*picture"):
        features.take(np.array([0, 1]))


def test_shards_without_any_readable_picture_are_refused(tmp_path: Path) -> None:
    data = Shards(tiny.shards(tmp_path, broken=tuple(range(ROWS))))
    with pytest.raises(ValueError, match=f"none of {ROWS} pictures can be read"):
        write_features(tmp_path / "x", data, teacher())


# --- how rows are computed --------------------------------------------------------------------------------


def table_of_three_captions(folder: Path) -> Path:
    """A table in which three rows after another have one picture, beside one where each has its own."""
    csv_table(folder)
    rows = [f"{folder}/{i // 3}.png\t{caption}" for i, caption in enumerate(CAPTIONS)]
    (folder / "shared.csv").write_text("\n".join(["filepath\ttitle", *rows]))
    return folder / "shared.csv"


def test_a_picture_of_several_captions_is_opened_and_encoded_once_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, opened, rows_of_batches = csv_data(table_of_three_captions(tmp_path)), Mock(wraps=Image.open), []
    monkeypatch.setattr(Image, "open", opened)
    write_features(
        tmp_path / "shared", data, teacher(record_batch_sizes(rows_of_batches)), batch_size=ROWS
    ).check()
    pictures = math.ceil(ROWS / 3)
    assert sum(rows_of_batches) == opened.call_count == pictures


def test_a_picture_of_several_captions_has_the_features_that_it_has_alone(tmp_path: Path) -> None:
    data, rows = csv_data(table_of_three_captions(tmp_path)), np.arange(ROWS)
    shared = write_features(tmp_path / "shared", data, teacher(), batch_size=ROWS).take(rows)
    single = write_features(tmp_path / "single", csv_data(tmp_path / "pairs.csv"), teacher(), batch_size=ROWS)
    images, texts = NAMES
    np.testing.assert_allclose(shared[images], single.take(rows // 3)[images], atol=1e-3)  # float16
    np.testing.assert_array_equal(shared[texts], single.take(rows)[texts])


def test_batches_end_with_their_shard_and_their_source(tmp_path: Path) -> None:
    """In shards of 12 rows and batches of 8; of one file, and of three with 14, 13 and 13 rows."""
    for data, ends in (
        (csv_data(csv_table(tmp_path)), [8, 12, 20, 24, 32, 36, 40]),
        (Shards(tiny.shards(tmp_path, number=3)), [8, 12, 14, 22, 24, 27, 35, 36, 40]),
    ):
        rows_of_batches: list[int] = []
        write_features(
            tmp_path / f"{len(ends)}", data, teacher(record_batch_sizes(rows_of_batches, NAMES[1]))
        ).check()
        assert np.cumsum(rows_of_batches).tolist() == ends


def test_small_data_have_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 65_536)
    sizes = {rows: writing.size_of_shards(rows) for rows in (40, 70_000, 10**6, 10**8)}
    # A sixteenth of the rows, but at least 4,096 and at most SHARD_ROWS.
    assert sizes == {40: 4096, 70_000: 70_000 / 16, 10**6: 10**6 / 16, 10**8: 65_536}


@pytest.mark.parametrize("rows", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of files, which the system takes back, are not counted."""
    monkeypatch.setattr(writing, "SHARD_ROWS", 2**15)
    csv_table(tmp_path)
    lines = [f"{tmp_path}/{i % ROWS}.png\tpicture {i}" for i in range(rows)]
    (tmp_path / "many.csv").write_text("\n".join(["filepath\ttitle", *lines]))

    memory: list[int] = []  # MiB, in each batch

    def measure(name: str, features: Tensor) -> Tensor:
        status = Path("/proc/self/status").read_text()
        memory.append(int(re.search(r"RssAnon:\s*(\d+)", status)[1]) // 1024)
        return features

    data = csv_data(tmp_path / "many.csv")
    assert len(write_features(tmp_path / "output", data, teacher(measure), batch_size=64).check()) == rows
    quarter = len(memory) // 4
    # The heap has some free MiB, which hide small growth: 10,000 rows show what keeps 1.5 KiB of each row, as
    # its pixels and letters together take, and 100,000 rows a tenth of that.
    assert max(memory[-quarter:]) - max(memory[:quarter]) < 4  # MiB
