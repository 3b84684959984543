"""Writes the folder: batch by batch, by several processes, and on from where it was stopped.

Rows are written into drafts, files whose names begin with a dot. They take their names once all rows are
there: nothing is written through a link, or under a training that has mapped the folder.
"""

from __future__ import annotations

import datetime
import math
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm  # type: ignore[import-untyped]

from rankloss.checks import check_teacher
from rankloss_features.data import Data, Sample, Spans, groups_of
from rankloss_features.folder import (
    NAMES,
    Array,
    Features,
    Pairs,
    beside,
    hashes_of_pairs,
    hashes_of_rows,
    opened,
    read_about,
    read_array,
    replacing,
    spaces_of,
    write_about,
)
from rankloss_features.teachers import Teacher

_PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}
_FEW = 7  # rows that may all be equal, since they may be of one caption
_ESTIMATED = 10.0  # seconds after which the time and the size are estimated


class Batches(IterableDataset[Any]):
    """The batches that are left, prepared for the teacher.

    A batch holds the same rows in every run: a row's last bits may depend on the others of its batch.

    Yields:
        The batch's first and last row, the latter excluded, the rows and captions of its samples that can be
        read, and the teacher's inputs.
    """

    def __init__(self, data: Data, groups: list[tuple[int, Spans]], teacher: Teacher) -> None:
        self.data, self.groups = data, groups
        self.prepare = {name: encoder.prepare for name, encoder in teacher.encoders.items()}
        self.needs_pictures = any(encoder.needs_pictures for encoder in teacher.encoders.values())

    def __iter__(self) -> Iterator[Any]:
        """Those of this worker."""
        worker = get_worker_info()
        mine = self.groups if worker is None else self.groups[worker.id :: worker.num_workers]
        for source, spans in mine:
            for span, samples in zip(spans, self.data.read(source, spans), strict=True):
                if self.needs_pictures:
                    samples = list(self._readable(samples))
                prepared = {name: prepare(samples) for name, prepare in self.prepare.items() if samples}
                yield span, [x.row for x in samples], [x.caption for x in samples], prepared

    def _readable(self, samples: list[Sample]) -> Iterator[Sample]:
        pictures: dict[Any, Any] = {}
        for sample in samples:
            try:
                if sample.source not in pictures:
                    pictures[sample.source] = sample.open()
                yield sample._replace(open=pictures[sample.source].copy)
            except Exception as error:  # Pillow raises many
                if not self.data.is_stream:
                    where = f"row {sample.row}: the picture of {sample.name!r}"
                    raise ValueError(f"{where} cannot be read: {error}") from error


class Drafts(Features):
    """A folder while it is written."""

    drafts = True

    @property
    def files(self) -> list[Path]:
        """The files of rows, by their final names; that of the hashes is the last."""
        return [Path(self.path, f"{name}.npy") for name in (*self.arrays, "rows")]


def precision_on(device: torch.device) -> str:
    """The precision in which a device computes features, if no other is asked for."""
    return "amp_bf16" if device.type == "cuda" else "fp32"


def write(
    output: Path,
    data: Data,
    teacher: Teacher,
    settings: dict[str, Any],
    workers: int,
    *,
    shared: bool = True,
) -> None:
    """Write the features of all pairs into a folder, or those that are missing.

    Args:
        output: The folder.
        data: The pairs.
        teacher: The source of the features.
        settings: ``dtype``, ``precision``, ``batch_size`` and ``command``, which go into ``features.json``.
        workers: Processes that read the data, for each process that computes.
        shared: True if each process of torchrun calls this, to write a share; only the first of them locks,
            begins and finishes the folder. False: this process writes all.

    Raises:
        ValueError: It is no folder, or its lock is a link; it holds something else, was begun with other
            pairs, another teacher or other settings, or is being written by another run; the teacher gives no
            teacher's features. Nothing in the folder is lost.
        OSError: The disk is full, or the folder cannot be written.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not shared:
        rank, world = 0, 1
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if rank == 0:
        if os.path.lexists(output) and not output.is_dir():
            raise ValueError(f"--output {output} is no folder, nor a link to one that is there")
        output.mkdir(parents=True, exist_ok=True)
        if read_about(output) is None and any(not x.name.startswith(".") for x in output.iterdir()):
            raise ValueError(f"--output {output} has files and no features.json: it is not of this command")
    with _locked(output) if rank == 0 else nullcontext():
        is_whole = rank == 0 and _begin(output, data, teacher, settings)
        if world > 1:
            begun = [(is_whole, data.counts)]
            torch.distributed.broadcast_object_list(begun)  # the others wait for it
            is_whole, data.counts = begun[0]
        if is_whole:
            return
        folder = Drafts(str(output))
        _compute(folder, data, teacher, settings, workers, rank, world)
        if world > 1:
            torch.distributed.barrier()
        if rank == 0:
            _finish(folder)


def _compute(
    folder: Drafts,
    data: Data,
    teacher: Teacher,
    settings: dict[str, Any],
    workers: int,
    rank: int,
    world: int,
) -> None:
    """Write the rows that this process has to, and wait until they are on the disk."""
    groups = groups_of(data, settings["batch_size"])[rank::world]
    left = [(source, [x for x in spans if not folder.whole(slice(*x)).all()]) for source, spans in groups]
    rows, todo = (sum(last - first for _, spans in x for first, last in spans) for x in (groups, left))
    batches = Batches(data, [group for group in left if group[1]], teacher)
    with tqdm(total=rows, initial=rows - todo, unit="row", disable=rank != 0) as bar:
        is_estimated = bar.disable
        for (first, last), samples, captions, prepared in DataLoader(batches, None, num_workers=workers):
            stored = {name: np.zeros_like(x[first:last]) for name, x in folder.arrays.items()}
            hashes = np.array(folder.pairs[first:last])  # of rows without features
            if samples:
                features = teacher.encode(prepared, _PRECISIONS[settings["precision"]])
                places = np.array(samples) - first
                for name, encoded in features.items():
                    stored[name][places] = encoded.numpy()
                    _check(name, samples, captions, torch.from_numpy(stored[name][places]))
                hashes[places] = hashes_of_rows(hashes[places], [x[places] for x in stored.values()])
            for file, array in zip(folder.files, [*stored.values(), hashes], strict=True):  # the hashes last
                _write_rows(beside(file), first - len(folder), array)
            bar.update(last - first)
            if not is_estimated and bar.format_dict["elapsed"] >= _ESTIMATED:
                is_estimated = True
                bar.write(_estimate(bar, folder), file=sys.stderr)
    for file in folder.files:
        with beside(file).open("rb") as written:
            os.fsync(written.fileno())


# --- the beginning and the end ----------------------------------------------------------------------------


def lock_of(file: Path) -> FileLock:
    """The lock that a file is.

    Raises:
        ValueError: The file is a link: filelock before 4.2.1 empties a file that has a second name.
    """
    with suppress(FileNotFoundError):
        found = file.lstat()
        if stat.S_ISLNK(found.st_mode) or (found.st_nlink > 1 and found.st_size):
            raise ValueError(f"{file} is a link to another file, which a lock might empty: delete the link")
    return FileLock(file)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process, however that ends.

    Raises:
        ValueError: Another process holds it, or it is a link.
    """
    lock, holder = lock_of(output / ".lock"), output / ".holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        name = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise ValueError(f"--output {output} is being written by {name!r}") from error
    try:
        with replacing(holder) as file:
            name = f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%c}"
            file.write(name.encode())
        yield
    finally:
        lock.release()


def _begin(output: Path, data: Data, teacher: Teacher, settings: dict[str, Any]) -> bool:
    """Make the folder, or verify that it is of this command; True if every row is there.

    Otherwise the drafts have the rows that are there, and the space of all.
    """
    widths = {name: encoder.width for name, encoder in teacher.encoders.items()}
    about: dict[str, Any] = {"teacher": teacher.about, "scale": teacher.scale, "spaces": teacher.spaces}
    about |= {"widths": widths, **settings}
    found = read_about(output)
    if found:
        found["spaces"] = spaces_of(found)
    for key in ("teacher", "widths", "spaces", "dtype", "precision", "batch_size"):
        if found and found[key] != about[key]:
            raise ValueError(
                f"--output {output} was begun with another {key}, {found[key]}, not {about[key]}; by its own "
                f"account, its command was {found['command']!r}"
            )
    if found and (found["complete"] or (output / "pairs.npy").exists()):
        Pairs(str(output)).compare(data.pairs(), str(data.about["data"]))
        if found["complete"] and _is_whole(output):
            return True
        rows = found["rows"]
    else:
        pairs = _hashed(data)
        rows = len(pairs)
        if teacher.rows not in (None, rows):
            raise ValueError(f"--features has {teacher.rows} rows, and the data have {rows}")
        for name in (*NAMES, "rows"):  # drafts of another teacher, if only the visible files were deleted
            beside(output / f"{name}.npy").unlink(missing_ok=True)
        write_about(output, {**about, "complete": False, "rows": rows, "data": data.about})
        with replacing(output / "pairs.npy") as file:
            np.save(file, pairs)
    for name, width in widths.items():
        _draft(output / f"{name}.npy", about["dtype"], (rows, width))
    _draft(output / "rows.npy", "uint64", (rows,))
    return False


def _is_whole(output: Path) -> bool:
    try:
        Features(str(output)).check()
    except ValueError:
        return False
    return True


def _finish(folder: Drafts) -> None:
    """Give the files their names, and say that the folder is complete."""
    output, skipped = Path(folder.path), int((~folder.present(slice(None))).sum())
    if skipped == len(folder):
        raise ValueError(f"--data: none of {skipped} pictures can be read")
    for file in folder.files:
        beside(file).replace(file)
    write_about(output, {**folder.about, "complete": True, "skipped": skipped}, folder.rows)


def _hashed(data: Data) -> Array:
    """The hashes of all pairs."""
    blocks = [hashes_of_pairs(*block) for block in data.pairs()]
    if not blocks:
        raise ValueError(f"--data {data.about['data']} has no pairs of a picture and a caption")
    hashes = np.concatenate(blocks)
    if data.is_stream:
        _, first, number = np.unique(hashes, return_index=True, return_counts=True)
        if (number > 1).any():
            row = first[number.argmax()]
            raise ValueError(f"--data: sample {row} is not the only one with its key and caption")
    return hashes


def _estimate(bar: Any, folder: Drafts) -> str:
    """The time that is left, and the size of the folder."""
    seconds = bar.format_dict["elapsed"] * (bar.total - bar.n) / (bar.n - bar.initial)
    size = sum(x.nbytes for x in (*folder.arrays.values(), folder.rows, folder.pairs))
    left = tqdm.format_interval(seconds)
    return f"{folder.path}: about {left} left; {len(folder):,} rows will take {size / 1e6:,.1f} MB"


# --- files ------------------------------------------------------------------------------------------------


def _draft(file: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Make the draft of a file: the rows that are there, and the space of all, so that a full disk shows now.

    A draft that is there goes on, unless it is a link to a file elsewhere.
    """
    draft = beside(file)
    if _read(draft, dtype, shape) is not None and not draft.is_symlink() and draft.stat().st_nlink == 1:
        return
    draft.unlink(missing_ok=True)
    stored = _read(file, dtype, shape)
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with opened(draft, "xb") as written:
        np.lib.format.write_array_header_1_0(written, described)
        size = written.tell() + np.dtype(dtype).itemsize * math.prod(shape)
        written.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(written.fileno(), 0, size)
        if stored is not None:
            written.write(stored.data)


def _read(file: Path, dtype: str, shape: tuple[int, ...]) -> Array | None:
    try:
        return read_array(file, dtype, shape)
    except ValueError:
        return None


def _write_rows(file: Path, first: int, rows: Array) -> None:
    """Write rows of an array, of which the first is counted from its end, as negative indices are.

    Not through a mapping: machines that share a folder would write whole pages over each other's rows.
    """
    with opened(file, "r+b") as written:
        written.seek(first * rows[0].nbytes, os.SEEK_END)
        written.write(rows.data)


# --- rows -------------------------------------------------------------------------------------------------


def _check(name: str, rows: list[int], captions: list[str], features: torch.Tensor) -> None:
    """Raise a ValueError unless a teacher can have given these features of a batch."""
    size = len(rows) if len(set(captions)) > _FEW else _FEW  # neighbours may share a caption, and then a row
    for first in range(0, len(rows), size):
        where = f"the teacher's {name}, counted from row {rows[first]},"
        check_teacher(where, features[first : first + size], first_look=False)
