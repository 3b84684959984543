"""Writes the folder: batch by batch, by several processes, and on from where it was stopped."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm  # type: ignore[import-untyped]

from rankloss.checks import check_teacher
from rankloss_features.data import Data, Sample, Spans, groups_of
from rankloss_features.folder import (
    Array,
    Features,
    hashes_of_pairs,
    hashes_of_rows,
    read_about,
    spaces_of,
    write_about,
)
from rankloss_features.locking import locked
from rankloss_features.merging import Joined
from rankloss_features.teachers import Teacher

_PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}
_FEW = 7  # rows that may all be equal, since they may be of one caption


class Batches(IterableDataset[Any]):
    """The batches that are left, prepared for the teacher.

    A batch holds the same rows in every run: a row's last bits may depend on the others of its batch.

    Yields:
        The batch's first and last row, the latter excluded, the rows and captions of its samples that can be
        read, and the teacher's inputs.
    """

    def __init__(self, data: Data | Joined, groups: list[tuple[int, Spans]], teacher: Teacher) -> None:
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
        opened: dict[Any, Any] = {}
        for sample in samples:
            try:
                if sample.source not in opened:
                    opened[sample.source] = sample.open()
                yield sample._replace(open=opened[sample.source].copy)
            except Exception as error:  # Pillow raises many
                if not self.data.is_stream:
                    where = f"row {sample.row}: the picture of {sample.name!r}"
                    raise ValueError(f"{where} cannot be read: {error}") from error


def write(
    output: Path, data: Data | Joined, teacher: Teacher, settings: dict[str, Any], workers: int
) -> None:
    """Write the features of all pairs into a folder, or those that are missing.

    Under torchrun each process writes a share. Only the first of them locks, begins and finishes the folder.

    Args:
        output: The folder.
        data: The pairs.
        teacher: The source of the features.
        settings: ``dtype``, ``precision``, ``batch_size`` and ``command``, which go into ``features.json``.
        workers: Processes that read the data, for each process that computes.

    Raises:
        ValueError: The folder holds something else, was begun with other pairs, another teacher or other
            settings, or is being written by another run; the teacher gives no teacher's features. Nothing in
            the folder is lost.
        OSError: The disk is full, or the folder cannot be written.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        if read_about(output) is None and any(not x.name.startswith(".") for x in output.iterdir()):
            raise ValueError(f"--output {output} has files and no features.json: it is not of this command")
    with locked(output, wait=False) if rank == 0 else nullcontext():
        if rank == 0:
            _begin(output, data, teacher, settings)
        if world > 1:
            counted = [data.counts]
            torch.distributed.broadcast_object_list(counted)  # the others wait for it
            data.counts = counted[0]
        folder = Features(str(output), unfinished=True)
        groups = groups_of(data, settings["batch_size"])[rank::world]
        left = [(source, [x for x in spans if not folder.whole(slice(*x)).all()]) for source, spans in groups]
        rows, todo = (sum(last - first for _, spans in x for first, last in spans) for x in (groups, left))
        batches = Batches(data, [group for group in left if group[1]], teacher)
        with tqdm(total=rows, initial=rows - todo, unit="row", disable=rank != 0) as bar:
            loader = DataLoader(batches, None, num_workers=workers)
            for (first, last), samples, captions, prepared in loader:
                stored = {name: np.zeros_like(x[first:last]) for name, x in folder.arrays.items()}
                hashes = np.array(folder.pairs[first:last])  # of rows without features
                if samples:
                    features = teacher.encode(prepared, _PRECISIONS[settings["precision"]])
                    places = np.array(samples) - first
                    for name, encoded in features.items():
                        stored[name][places] = encoded.numpy()
                        _check(name, samples, captions, torch.from_numpy(stored[name][places]))
                    hashes[places] = hashes_of_rows(hashes[places], [x[places] for x in stored.values()])
                for name, array in {**stored, "rows": hashes}.items():  # the hashes last
                    _write_rows(output / f"{name}.npy", first - len(folder), array)
                bar.update(last - first)
        _sync(output)
        if world > 1:
            torch.distributed.barrier()
        if rank == 0:
            skipped = int((~folder.present(slice(None))).sum())
            if skipped == len(folder):
                raise ValueError(f"--data: none of {skipped} pictures can be read")
            write_about(output, {**folder.about, "complete": True, "skipped": skipped}, folder.rows)


# --- the beginning ----------------------------------------------------------------------------------------


def _begin(output: Path, data: Data | Joined, teacher: Teacher, settings: dict[str, Any]) -> None:
    """Make the folder, or verify that it is of this command, and claim the space of all rows."""
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
    known = found if found and (found["complete"] or (output / "pairs.npy").exists()) else None
    if known is None:
        pairs = _hashed(data)
        if teacher.rows not in (None, len(pairs)):
            raise ValueError(f"--features has {teacher.rows} rows, and the data have {len(pairs)}")
        write_about(output, {**about, "complete": False, "rows": len(pairs), "data": data.about})
        _write_rows(_claimed(output / ".pairs.npy", "uint64", pairs.shape), -len(pairs), pairs)
        (output / ".pairs.npy").replace(output / "pairs.npy")
    rows = len(pairs) if known is None else known["rows"]
    for name, width in widths.items():
        _claimed(output / f"{name}.npy", about["dtype"], (rows, width))
    _claimed(output / "rows.npy", "uint64", (rows,))
    _sync(output)
    if known is not None:
        folder = Features(str(output), unfinished=True)
        if not isinstance(data, Joined):
            folder.compare(data.pairs(), str(data.about["data"]))
        elif not np.array_equal(folder.pairs, data.hashes):
            raise ValueError(f"{output}/pairs.npy is not as it was written")


def _hashed(data: Data | Joined) -> Array:
    """The hashes of all pairs."""
    if isinstance(data, Joined):
        return data.hashes
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


# --- files ------------------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """A file to write, made if it is missing, whose errors name it."""
    try:
        with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as opened:
            yield opened
    except OSError as error:
        advice = "Make room, and give the same command"
        raise OSError(error.errno, f"{error.strerror}: {file}. {advice}") from error


def _claimed(file: Path, dtype: str, shape: tuple[int, ...]) -> Path:
    """Give a file its header and its size on the disk, so that a full disk shows now. Rows in it stay."""
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with _opened(file) as opened:
        np.lib.format.write_array_header_1_0(opened, described)
        size = opened.tell() + np.dtype(dtype).itemsize * math.prod(shape)
        opened.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
    return file


def _write_rows(file: Path, first: int, rows: Array) -> None:
    """Write rows of an array, of which the first is counted from its end, as negative indices are.

    Not through a mapping: machines that share a folder would write whole pages over each other's rows.
    """
    with _opened(file) as opened:
        opened.seek(first * rows[0].nbytes, os.SEEK_END)
        opened.write(rows.data)


def _sync(output: Path) -> None:
    """Wait until all arrays are on the disk."""
    for file in output.glob("*.npy"):
        with file.open("rb") as written:
            os.fsync(written.fileno())


# --- rows -------------------------------------------------------------------------------------------------


def _check(name: str, rows: list[int], captions: list[str], features: torch.Tensor) -> None:
    """Raise a ValueError unless a teacher can have given these features of a batch."""
    size = len(rows) if len(set(captions)) > _FEW else _FEW  # neighbours may share a caption, and then a row
    for first in range(0, len(rows), size):
        where = f"the teacher's {name}, counted from row {rows[first]},"
        check_teacher(where, features[first : first + size], first_look=False)
