"""Commands on a disk that is full at some of their writes: a clear error, and nothing that looks whole."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny_teacher as tiny

from rankloss_features import Features, caching, sources
from rankloss_features.caching import Spec, cached
from rankloss_features.heads import load_heads
from rankloss_trainers.console import main

FULL = os.strerror(errno.ENOSPC)
PAGE = 4096


@dataclass(frozen=True)
class Command:
    """A command that writes, in a folder of its own."""

    call: Callable[[Path], int]
    """Writes below a folder; the exit code."""
    read: Callable[[Path], Any]
    """Reads what was written, and raises a ValueError for a part of it."""


class Missing(ValueError):
    """Raised by a reader where nothing was written."""


def commands(sample: Path) -> dict[str, Command]:
    """The commands on the sample, by their names."""
    data_options = ["--data", f"{sample}/train.csv", "--workers", "0"]
    encoders = ["--image-encoder", f"{sample}/image_encoder", "--text-encoder", f"{sample}/text_encoder"]
    held_out = ["--val-data", f"{sample}/val.csv", "--ids-key", "product"]
    short = ["--epochs", "2", "--width", "8"]
    model = ["--model", f"local-dir:{sample}/open_clip"]

    def writing_call(*options: str, output: str) -> Callable[[Path], int]:
        """The call of a command whose last option is the place where it writes, below a folder."""
        return lambda folder: main([*options, f"{folder}/{output}"])

    def read_sample(folder: Path) -> None:
        if not (folder / "new").exists():
            raise Missing
        written = {file.name for file in (folder / "new").rglob("*")}
        assert written == {file.name for file in sample.rglob("*")}

    def read_json(folder: Path) -> Any:
        if not (folder / "x.json").exists():
            raise Missing
        return json.loads((folder / "x.json").read_text())

    def read_features(folder: Path) -> Features:
        return Features(f"{folder}/teacher").check()

    def read_aligned(folder: Path) -> None:
        if read_features(folder).alignment is None:
            raise Missing

    return {
        "sample": Command(writing_call("sample", "--output", output="new"), read_sample),
        "heads": Command(
            writing_call("heads", *encoders, *data_options, *held_out, *short, "--output", output="heads"),
            lambda folder: load_heads(folder / "heads"),
        ),
        "evaluate": Command(
            writing_call("evaluate", *model, *data_options, "--json", output="x.json"), read_json
        ),
        "features": Command(
            writing_call("features", *encoders, *data_options, "--output", output="teacher"), read_features
        ),
        "aligned": Command(
            writing_call("features", *encoders, *data_options, "--align", "--output", output="teacher"),
            read_aligned,
        ),
    }


def fail(_: int) -> None:
    """The call of ``os.fsync`` on a full disk."""
    raise OSError(errno.ENOSPC, FULL)


def fsyncs_of(call: Callable[[], int]) -> int:
    """How many files a command brings to the disk."""
    fsync = Mock(wraps=os.fsync)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert call() == 0
    return fsync.call_count


def call_on_full_disk(call: Callable[[], int], at: int) -> int:
    """Call a command while a single file, by its number, cannot be brought to the disk; the exit code."""
    fsync, files = os.fsync, itertools.count()

    def fsync_or_fail(file: int) -> None:
        if next(files) == at:
            fail(file)
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync_or_fail)
        return call()


@pytest.mark.parametrize(
    "name",
    [
        "heads",
        "evaluate",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sample", "features", "aligned")),
    ],
)
def test_a_disk_that_is_full_is_named_and_the_same_command_goes_on(
    sample_folder: Path, tmp_path: Path, name: str, capsys: Any
) -> None:
    """Full where a file is to be brought to the disk, at the first file and at the last."""
    command = commands(sample_folder)[name]
    whole, disk = tmp_path / "whole", tmp_path / "disk"  # written without a fault, and with some
    whole.mkdir()
    disk.mkdir()
    last = fsyncs_of(lambda: command.call(whole)) - 1
    for at in (0, last):
        assert call_on_full_disk(lambda: command.call(disk), at) == 1
        assert FULL in capsys.readouterr().err
        with pytest.raises(ValueError):  # noqa: PT011 (each reader has its own)
            command.read(disk)
    assert command.call(disk) == 0
    command.read(disk)


# --- a disk -----------------------------------------------------------------------------------------------


class Disk:
    """A file system in memory.

    Args:
        folder: Its place.
        size: Its bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this process may not mount a file system")

    def clear_and_fill(self, free: int) -> None:
        """Delete all files, and leave so many bytes free."""
        for file in self.folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()
        (self.folder / ".filler").write_bytes(bytes(self.size - free))

    def free(self) -> None:
        """Leave the other files, and all of the rest free."""
        (self.folder / ".filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", 64 * 2**20)
    yield made
    subprocess.run(["umount", str(made.folder)], check=True)


def used_pages(folder: Path) -> int:
    """The pages that the files below a folder take up."""
    return sum(math.ceil(file.stat().st_size / PAGE) for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "heads", "evaluate", "features", "aligned"])
def test_whatever_is_left_of_a_disk_nothing_looks_whole(
    sample_folder: Path, disk: Disk, tmp_path: Path, name: str, capsys: Any
) -> None:
    """At shares of what the command needs; with the rest free, the same command goes on."""
    command, whole = commands(sample_folder)[name], tmp_path / "whole"
    whole.mkdir()
    assert command.call(whole) == 0
    for share in (0, 0.3, 0.6, 0.99):
        pages = max(0, int(share * used_pages(whole)) - 1)  # one less, so that the last share lacks one, too
        disk.clear_and_fill(free=pages * PAGE)
        assert command.call(disk.folder) == 1, share
        assert FULL in capsys.readouterr().err
        with pytest.raises(ValueError):  # noqa: PT011
            command.read(disk.folder)
        disk.free()
        assert command.call(disk.folder) == 0
        command.read(disk.folder)


@pytest.mark.slow
def test_a_cache_of_teachers_on_a_full_disk_is_no_teacher(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk of every size that is too small; with the rest free, the same call goes on."""
    monkeypatch.setattr(sources, "load", lambda *_: tiny.teacher())
    monkeypatch.setattr(caching, "_WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    data, spec = tiny.data_of("csv", tmp_path / "data"), Spec.of("image=some,text=other")
    whole = Path(cached(spec, data, tmp_path / "cache", "cpu"))
    for pages in range(used_pages(whole)):
        disk.clear_and_fill(free=pages * PAGE)
        with pytest.raises(OSError, match=FULL):
            cached(spec, data, disk.folder / "cache", "cpu")
        for folder in (disk.folder / "cache").glob("*/"):
            with pytest.raises(ValueError):  # noqa: PT011
                Features(str(folder)).check()
        disk.free()
        after = Path(cached(spec, data, disk.folder / "cache", "cpu"))
        assert tiny.contents_without_command(after) == tiny.contents_without_command(whole)
