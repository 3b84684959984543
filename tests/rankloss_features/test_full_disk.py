"""Commands on a disk that is full at each of their writes: a clear error, and nothing that looks whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher as tiny

from rankloss_features import Features, caching, sources
from rankloss_features.caching import Spec, cached
from rankloss_features.heads import load_heads
from rankloss_trainers.console import main

FULL = os.strerror(errno.ENOSPC)
PAGE = 4096


class Command:
    """A command that writes, in a folder of its own.

    Attributes:
        call: Writes below a folder; the exit code.
        read: Reads what was written, and raises a ValueError for a part of it.
    """

    def __init__(self, call: Callable[[Path], int], read: Callable[[Path], Any]) -> None:
        self.call, self.read = call, read


def commands(sample: Path) -> dict[str, Command]:
    data = ["--data", str(sample / "train.csv"), "--workers", "0"]
    encoders = [
        "--image-encoder",
        str(sample / "image_encoder"),
        "--text-encoder",
        str(sample / "text_encoder"),
    ]
    of_heads = [
        *encoders,
        *data,
        "--val-data",
        f"{sample}/val.csv",
        "--ids-key",
        "product",
        "--epochs",
        "2",
        "--width",
        "8",
    ]
    of_evaluate = ["--model", f"local-dir:{sample}/open_clip", *data]

    def read_sample(folder: Path) -> None:
        if not (folder / "new").exists():
            raise ValueError
        assert {x.name for x in (folder / "new").rglob("*")} == {x.name for x in sample.rglob("*")}

    def read_json(folder: Path) -> Any:
        return json.loads((folder / "x.json").read_text()) if (folder / "x.json").exists() else _missing()

    return {
        "sample": Command(lambda folder: main(["sample", "--output", f"{folder}/new"]), read_sample),
        "heads": Command(
            lambda folder: main(["heads", *of_heads, "--output", f"{folder}/heads"]),
            lambda folder: load_heads(folder / "heads"),
        ),
        "evaluate": Command(
            lambda folder: main(["evaluate", *of_evaluate, "--json", f"{folder}/x.json"]), read_json
        ),
        "features": Command(
            lambda folder: main(["features", *encoders, *data, "--output", f"{folder}/teacher"]),
            lambda folder: Features(str(folder / "teacher")).check(),
        ),
        "aligned": Command(
            lambda folder: main(["features", *encoders, *data, "--align", "--output", f"{folder}/teacher"]),
            lambda folder: Features(str(folder / "teacher")).check().alignment or _missing(),
        ),
    }


def _missing() -> None:
    raise ValueError


@pytest.mark.parametrize(
    "name",
    [
        "heads",
        "evaluate",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sample", "features", "aligned")),
    ],
)
def test_a_disk_that_is_full_is_named_and_the_same_command_goes_on(
    sample_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Full where a file is to be brought to the disk, at the first file and at the last."""
    command, fsync = commands(sample_folder)[name], os.fsync
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(file) or fsync(file))
    (tmp_path / "whole").mkdir()
    assert command.call(tmp_path / "whole") == 0
    (tmp_path / "disk").mkdir()
    for at in (0, len(calls) - 1):
        left = iter([*[fsync] * at, _fail])
        monkeypatch.setattr(os, "fsync", lambda file, left=left: next(left, fsync)(file))
        assert command.call(tmp_path / "disk") == 1
        assert FULL in capsys.readouterr().err
        with pytest.raises(ValueError):  # noqa: PT011 (each reader has its own)
            command.read(tmp_path / "disk")
    monkeypatch.setattr(os, "fsync", fsync)
    assert command.call(tmp_path / "disk") == 0
    command.read(tmp_path / "disk")


def _fail(_: int) -> None:
    raise OSError(errno.ENOSPC, FULL)


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

    def leave(self, free: int) -> None:
        """Fill it up to so many bytes."""
        filler = self.folder / ".filler"
        filler.unlink(missing_ok=True)
        for file in [x for x in self.folder.iterdir() if x != filler]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        filler.write_bytes(bytes(self.size - free))

    def empty(self) -> None:
        (self.folder / ".filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", 64 * 2**20)
    yield made
    subprocess.run(["umount", str(made.folder)], check=True)


def used(folder: Path) -> int:
    return sum(-(-x.stat().st_size // PAGE) * PAGE for x in folder.rglob("*") if x.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "heads", "evaluate", "features", "aligned"])
def test_whatever_is_left_of_a_disk_nothing_looks_whole(
    sample_folder: Path, disk: Disk, tmp_path: Path, name: str, capsys: Any
) -> None:
    command = commands(sample_folder)[name]
    (tmp_path / "whole").mkdir()
    assert command.call(tmp_path / "whole") == 0
    needed = used(tmp_path / "whole")
    for part in (0, 0.3, 0.6, 0.99):
        disk.leave(max(0, int(part * needed) - PAGE) // PAGE * PAGE)
        assert command.call(disk.folder) == 1, part
        assert FULL in capsys.readouterr().err
        with pytest.raises(ValueError):  # noqa: PT011
            command.read(disk.folder)
        disk.empty()
        assert command.call(disk.folder) == 0
        command.read(disk.folder)


@pytest.mark.slow
def test_a_cache_of_teachers_on_a_full_disk_is_no_teacher(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "load", lambda given, args, device: tiny.teacher())
    monkeypatch.setattr(caching, "_WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    data, spec = tiny.data_of("csv", tmp_path / "data"), Spec.of("image=some,text=other")
    whole = cached(spec, data, tmp_path / "cache", "cpu")
    for pages in range(used(Path(whole)) // PAGE):
        disk.leave(pages * PAGE)
        with pytest.raises(OSError, match=FULL):
            cached(spec, data, disk.folder / "cache", "cpu")
        for folder in (disk.folder / "cache").glob("*/"):
            with pytest.raises(ValueError):  # noqa: PT011
                Features(str(folder)).check()
        disk.empty()
        found = tiny.files(Path(cached(spec, data, disk.folder / "cache", "cpu")))
        expected = tiny.files(Path(whole))
        assert found.pop("folder.json") != expected.pop("folder.json")  # which has the command
        assert found == expected
