"""Writes the folder: batch by batch, by several processes, and on from where it was stopped."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm  # type: ignore[import-untyped]

from rankloss.checks import check_teacher
from rankloss_features.data import Data, Sample, Spans
from rankloss_features.folder import SKIPPED, Array, hashes_of_pairs, hashes_of_rows, read_about, write_about
from rankloss_features.teachers import Teacher

_PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}
_FEW = 7  # rows that may all be equal, since they may be of one caption


class Batches(IterableDataset[Any]):
    """What is left to do, prepared for the teacher.

    A batch holds the same rows in every run: a row's last bits may depend on the others of its batch.

    Yields:
        The batch's first and last row, the latter excluded, the samples' rows and captions, and what the
        teacher takes.
    """

    def __init__(self, data: Data, groups: list[tuple[int, Spans]], teacher: Teacher) -> None:
        self.data, self.groups = data, groups
        self.prepare = {name: encoder.prepare for name, encoder in teacher.encoders.items()}
        self.needs_pictures = teacher.needs_pictures

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
        for sample in samples:
            try:
                picture = sample.open()
            except Exception as error:  # Pillow raises many
                if not self.data.skips_broken:
                    raise ValueError(
                        f"row {sample.row}: the picture of {sample.name!r} cannot be read: {error}"
                    ) from error
            else:
                yield sample._replace(open=partial(Image.Image.copy, picture))


def write(
    output: Path,
    data: Data,
    teacher: Teacher,
    settings: dict[str, Any],
    *,
    device: torch.device,
    workers: int,
) -> None:
    """Write the features of all pairs into a folder, or what is missing of them.

    Under torchrun each process writes a share. Only the first of them begins and finishes the folder.

    Args:
        output: The folder.
        data: The pairs.
        teacher: What gives the features.
        settings: ``dtype``, ``precision``, ``batch_size`` and ``command``, which go into ``features.json``.
        device: What the teacher computes on.
        workers: Processes that read the data, for each process that computes.

    Raises:
        ValueError: The folder holds something else, or was begun with other pairs, another teacher or other
            settings; the teacher gives what is no teacher's features. Nothing in the folder is lost.
        OSError: The disk is full, or the folder cannot be written.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if rank == 0:
        _begin(output, data, teacher, settings)
    if world > 1:
        counted = [data.counts]
        torch.distributed.broadcast_object_list(counted)  # the others wait for it
        data.counts = counted[0]
    groups = data.spans(settings["batch_size"])[rank::world]
    names = list(teacher.encoders)
    left = [(source, [x for x in spans if not _is_done(output, names, *x)]) for source, spans in groups]
    rows, todo = (sum(last - first for _, spans in x for first, last in spans) for x in (groups, left))
    batches = Batches(data, [group for group in left if group[1]], teacher)
    with tqdm(total=rows, initial=rows - todo, unit="row", disable=rank != 0) as bar:
        for (first, last), samples, captions, prepared in DataLoader(batches, None, num_workers=workers):
            if samples:
                features = teacher.encode(prepared, device, _PRECISIONS[settings["precision"]])
                _store(output, samples, captions, features)
            _map(output, "rows")[sorted({*range(first, last)} - {*samples})] = SKIPPED
            bar.update(last - first)
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        _finish(output)


# --- the beginning ----------------------------------------------------------------------------------------


def _begin(output: Path, data: Data, teacher: Teacher, settings: dict[str, Any]) -> None:
    """Make the folder, or see that it is the one to go on with, and claim the space of all rows."""
    output.mkdir(parents=True, exist_ok=True)
    found = read_about(output)
    if found is None and any(not x.name.startswith(".") for x in output.iterdir()):
        raise ValueError(
            f"--output {output} has files, and no features.json: it is no folder of this command"
        )
    widths = {name: encoder.width for name, encoder in teacher.encoders.items()}
    about = {
        "complete": False,
        "teacher": teacher.about,
        "scale": teacher.scale,
        "widths": widths,
        **settings,
    }
    for key in ("teacher", "widths", "dtype", "precision", "batch_size") if found else ():
        if found is not None and found.get(key) != about[key]:
            raise ValueError(
                f"--output {output} was begun with another {key}, {found.get(key)}; this command has "
                f"{about[key]}. To go on with the former: {found.get('command')}"
            )
    pairs = _hashed(output / ".pairs", data)
    if teacher.rows not in (None, len(pairs)):
        raise ValueError(f"--features has {teacher.rows} rows, and the data have {len(pairs)}")
    if found is not None and (output / "pairs.npy").exists():
        _compare(output, np.load(output / "pairs.npy", mmap_mode="r"), pairs)
    else:
        write_about(output, {**about, "rows": len(pairs), "data": data.about})
        np.save(output / ".pairs.npy", pairs)
        (output / ".pairs.npy").replace(output / "pairs.npy")
    (output / ".pairs").unlink()
    for name, width in widths.items():
        _allocate(output / f"{name}.npy", settings["dtype"], (len(pairs), width))
    _allocate(output / "rows.npy", "uint64", (len(pairs),))


def _hashed(file: Path, data: Data) -> Array:
    """The hashes of all pairs, by way of a file."""
    with file.open("wb") as written:
        for captions, images in data.pairs():
            hashes_of_pairs(captions, images).tofile(written)
    if not file.stat().st_size:
        raise ValueError(f"--data {data.about.get('data')} has no pairs of a picture and a caption")
    hashes = np.memmap(file, np.uint64, "r")
    if data.by_key:
        order = np.argsort(hashes, kind="stable")
        twice = np.diff(hashes[order]) == 0
        if twice.any():
            first, second = order[twice.argmax() :][:2]
            raise ValueError(
                f"--data: samples {first} and {second} have one key and one caption, by which a training "
                "finds its features: give every sample a key of its own"
            )
    return hashes


def _compare(output: Path, begun: Array, pairs: Array) -> None:
    if len(begun) == len(pairs) and np.array_equal(begun, pairs):
        return
    some = min(len(begun), len(pairs))
    wrong = begun[:some] != pairs[:some]
    row = int(wrong.argmax()) if wrong.any() else some
    raise ValueError(
        f"--output {output} was begun with other pairs: {len(begun)} then, {len(pairs)} now, and row {row} "
        "is the first to differ. Give another folder"
    )


def _allocate(file: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """A file of zeros on the disk, unless it is there: a full disk shows now, and not in hours.

    Running out of space while writing to a mapped file kills the process without an error message.
    """
    try:
        if not file.exists() or np.load(file, mmap_mode="r").shape != shape:
            np.lib.format.open_memmap(file, "w+", dtype, shape)
        with file.open("r+b") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
    except ValueError:  # no array: it was not written to its end
        file.unlink()
        _allocate(file, dtype, shape)
    except OSError as error:
        size = np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64)
        raise OSError(
            error.errno,
            f"{error.strerror}: {file} takes {size:,} bytes. Make room, and give the same command",
        ) from error


# --- rows -------------------------------------------------------------------------------------------------


def _map(output: Path, name: str) -> Array:
    """An array to read and write, mapped anew for each batch: what was touched would stay in memory."""
    array: Array = np.load(output / f"{name}.npy", mmap_mode="r+")
    return array


def _is_done(output: Path, names: list[str], first: int, last: int) -> bool:
    """Whether all rows are whole, or have been skipped."""
    hashes = _map(output, "rows")[first:last]
    if not hashes.all():
        return False
    whole = hashes_of_rows(_map(output, name)[first:last] for name in names)
    return bool(((hashes == SKIPPED) | (hashes == whole)).all())


def _store(output: Path, rows: list[int], captions: list[str], features: dict[str, Tensor]) -> None:
    """Write the rows of a batch, and then their hashes.

    Raises:
        ValueError: They are no teacher's features.
    """
    # Neighbours may share a caption, and then a row.
    size = len(rows) if len(set(captions)) > _FEW else _FEW
    stored = []
    for name, array in features.items():
        mapped = _map(output, name)
        array = array.to(getattr(torch, str(mapped.dtype)))
        for first in range(0, len(rows), size):
            where = f"the teacher's {name}, counted from row {rows[first]},"
            check_teacher(where, array[first : first + size], first_look=False)
        mapped[rows] = array.numpy()
        stored.append(array.numpy())
    _map(output, "rows")[rows] = hashes_of_rows(stored)


def _finish(output: Path) -> None:
    """Say that the folder is whole."""
    about, hashes = read_about(output), _map(output, "rows")
    assert about is not None
    skipped = int((hashes == SKIPPED).sum())
    if skipped == len(hashes):
        raise ValueError(f"--data: none of {skipped} pictures can be read")
    for file in output.glob("*.npy"):
        with file.open("rb") as written:
            os.fsync(written.fileno())
    write_about(output, {**about, "complete": True, "skipped": skipped})
