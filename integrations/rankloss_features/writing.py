"""Writes the folder, shard by shard, by several processes, and on from where it was stopped."""

from __future__ import annotations

import datetime
import logging
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from rankloss.checks import check_teacher
from rankloss_features import probing
from rankloss_features.data import Data, groups_of, some_rows
from rankloss_features.folder import (
    ABOUT,
    PAIRS,
    PICTURES,
    Array,
    Draft,
    hashes_of_pairs,
    numbers_of,
    read_about,
)
from rankloss_features.teachers import Batches, Teacher

SHARD_ROWS = 65_536
"""Rows of a shard, at most."""

JOINED_WITHIN = datetime.timedelta(minutes=5)
"""The time within which all processes of torchrun begin."""

_PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}
_logger = logging.getLogger("rankloss_features")


def precision_on(device: torch.device) -> str:
    """The precision in which a device computes features, if no other is asked for."""
    return "amp_bf16" if device.type == "cuda" else "fp32"


def size_of_shards(rows: int) -> int:
    """The rows of a shard: a sixteenth of all, so an interruption costs little; from 4,096 to 65,536."""
    return min(SHARD_ROWS, max(SHARD_ROWS // 16, math.ceil(rows / 16)))


def write(
    output: Path, data: Data, teacher: Teacher, settings: dict[str, Any], workers: int, *, shared: bool = True
) -> None:
    """Write the features of all pairs into a folder, or the shards that are missing.

    While another process writes the folder, this one waits. Memory holds the shards that are being computed,
    about one for each worker, and eight bytes of each pair.

    Args:
        output: The folder.
        data: The pairs.
        teacher: The source of the features.
        settings: ``dtype``, ``precision``, ``batch_size`` and ``command``, which go into ``folder.json``.
        workers: Processes that read the data, for each process that computes.
        shared: True if each process of torchrun calls this, to write a share; only the first of them locks,
            begins and finishes the folder. False: this process writes all.

    Raises:
        ValueError: It is no folder, or its lock is a link; it holds something else, was begun with other
            pairs, another teacher or other settings; the teacher gives no teacher's features. Nothing in the
            folder is lost.
        OSError: The disk is full, or the folder cannot be written.
        ConnectionError: As :func:`join_processes`.
    """
    rank, world = join_processes() if shared else (0, 1)
    is_first = rank == 0
    if is_first:
        make_folder(output)
    with only_writer(output / ".lock", output) if is_first else nullcontext():
        if is_first:
            _begin(output, data, teacher, settings)
        if world > 1:
            _share_counts(data)  # the others wait for the folder here
        draft = Draft(str(output))
        share = draft.shards[rank::world]
        _compute(draft, share, data, teacher, workers, shows=is_first)
        if world > 1:
            torch.distributed.barrier()
        if is_first:
            draft.finish()


def join_processes() -> tuple[int, int]:
    """The number of this process, and the number of all, in one process group; 0 and 1 without torchrun.

    Raises:
        ConnectionError: As :func:`_begin_group`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        _begin_group(rank, world)
    return rank, world


def make_folder(output: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        ValueError: It is a file, or a link to nothing.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"--output {output} is no folder, nor a link to one that is there")
    output.mkdir(parents=True, exist_ok=True)


def _share_counts(data: Data) -> None:
    """Give the counts of the first process's data to all others, once it has read them."""
    counts = [data.counts]
    torch.distributed.broadcast_object_list(counts)
    data.counts = counts[0]


def _begin_group(rank: int, world: int) -> None:
    """Begin a process group, once every process of torchrun runs this command.

    Where only the first process of a training starts this command, RANK and WORLD_SIZE are the training's,
    and the other processes never come.

    Raises:
        ConnectionError: Not all have come within :data:`JOINED_WITHIN`, or the port is the training's.
    """
    try:
        store, *_ = next(rendezvous("env://", timeout=JOINED_WITHIN))
        store = PrefixStore("rankloss features", store)
        store.set(f"process {rank}", "")
        store.wait([f"process {other}" for other in range(world)], JOINED_WITHIN)
    except torch.distributed.DistError as error:
        raise ConnectionError(
            f"RANK={rank} and WORLD_SIZE={world} are set, as torchrun sets them, but not all {world} "
            f"processes began this command within {JOINED_WITHIN.seconds} seconds. Where one process "
            "alone runs it, unset RANK and WORLD_SIZE"
        ) from error
    longest_wait = datetime.timedelta(days=7)  # of a process whose share is written, for the others
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=longest_wait
    )


@contextmanager
def only_writer(file: Path, folder: Path) -> Iterator[None]:
    """A context in which this process alone writes a folder: another one is waited for, with a warning.

    Args:
        file: The file of the lock, which ends with the process, however that ends.
        folder: The folder, for the warning.

    Raises:
        ValueError: The lock is a link: filelock before 4.2.1 empties a file that has a second name.
    """
    with suppress(FileNotFoundError):  # there is no lock yet
        status = file.lstat()
        has_a_second_name = status.st_nlink > 1
        if stat.S_ISLNK(status.st_mode) or (has_a_second_name and status.st_size > 0):
            raise ValueError(f"{file} is a link to another file, which a lock might empty: delete the link")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _logger.warning("another process writes a teacher's features into %s: waiting for it", folder)
        lock.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        lock.release()


def _begin(output: Path, data: Data, teacher: Teacher, settings: dict[str, Any]) -> None:
    """Write the folder's entries and the hashes of its pairs, or verify that those there are of this command.

    Raises:
        ValueError: The folder holds something else, or was begun with other pairs, another teacher or other
            settings.
    """
    about: dict[str, Any] = {
        "teacher": teacher.about,
        "pictures": asdict(teacher.rendering or data.rendering),
        "scale": teacher.scale,
        "spaces": teacher.spaces,
        "widths": {name: encoder.width for name, encoder in teacher.encoders.items()},
        "has_picture_hashes": _knows_pictures(teacher),
        **settings,
    }
    entries = read_about(output)
    if entries is None:
        check_has_no_files(output)
    else:
        check_is_of(output, entries, about)
        check_probe(output, entries, teacher)
    # A complete folder without its pairs is damaged and not begun again: Draft raises the error.
    has_pairs = entries is not None and (entries["complete"] or (output / PAIRS).exists())
    if has_pairs:
        Draft(str(output)).compare(data.pairs(), str(data.about["data"]))
    else:
        _begin_draft(output, data, teacher, about)


def _knows_pictures(teacher: Teacher) -> bool:
    """True if the teacher reads pictures, or the folder of its stored rows has the hashes of theirs."""
    if teacher.stored is not None and teacher.stored.pictures is not None:
        return True
    return any(encoder.needs_pictures for encoder in teacher.encoders.values())


def check_has_no_files(output: Path) -> None:
    """Raise a ValueError for a folder with files of another program: their names do not begin with a dot."""
    if any(not file.name.startswith(".") for file in output.iterdir()):
        raise ValueError(f"--output {output} has files and no {ABOUT}: it is not of this command")


def check_is_of(output: Path, entries: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise a ValueError for a folder that was begun with another teacher or other settings.

    Args:
        output: The folder.
        entries: Those of its ``folder.json``.
        about: Those that this command would write, or some of them.
    """
    for key in ("teacher", "pictures", "widths", "spaces", "dtype", "precision", "batch_size"):
        if key not in about:
            continue
        is_of_an_earlier_release = key == "pictures" and key not in entries
        if entries.get(key) != about[key] and not is_of_an_earlier_release:
            raise ValueError(
                f"--output {output} was begun with another {key}, {entries.get(key)}, not {about[key]}; by "
                f"its own account, its command was {entries.get('command')!r}"
            )


def check_probe(output: Path, entries: dict[str, Any], teacher: Teacher) -> None:
    """Raise a ValueError for a folder that was begun with encoders of the same weights and other features."""
    remedy = ". Restore it; or, for features of the new one, delete the folder and give the command again"
    probing.check_same_as_in_folder(f"--output {output}", entries, teacher, remedy)


def _begin_draft(output: Path, data: Data, teacher: Teacher, about: dict[str, Any]) -> None:
    """Write all of the folder but its shards: the entries, and the hashes of the pairs.

    Raises:
        ValueError: There are no pairs, or the stored features of ``--features`` are of others.
    """
    pairs = _hash_pairs(data)
    if teacher.rows not in (None, len(pairs)):
        raise ValueError(f"--features has {teacher.rows} rows, and the data have {len(pairs)}")
    if teacher.stored is not None:
        where = str(data.about["data"])
        if not np.array_equal(teacher.stored.pairs, pairs):
            teacher.stored.compare(data.pairs(), where, ": --features must be of these data, in their order")
        teacher.stored.compare_pictures(data.pictures(some_rows(len(pairs))), where)
    about = {**about, "shard_rows": size_of_shards(len(pairs)), "data": data.about}
    if teacher.rows is None:  # stored features are known by their hash
        about["probe"] = probing.entry_of(teacher)
    Draft.begin(output, about, pairs)


def _hash_pairs(data: Data) -> Array:
    """The hashes of all pairs, uint64, of which memory never holds a second copy.

    Raises:
        ValueError: There are none.
    """
    hashes = bytearray()  # which grows in place
    for block in data.pairs():
        hashes += hashes_of_pairs(block.captions, block.pictures).data
    if not hashes:
        raise ValueError(f"--data {data.about['data']} has no pairs of a picture and a caption")
    return np.frombuffer(hashes, np.uint64)


def _compute(
    draft: Draft, shards: Sequence[int], data: Data, teacher: Teacher, workers: int, *, shows: bool
) -> None:
    """Compute and write the features of some shards, but not of those that are on the disk and whole.

    Args:
        draft: The folder.
        shards: The numbers of the shards.
        data: The pairs.
        teacher: The source of the features.
        workers: Processes that read the data.
        shows: True to show a bar of progress.

    Raises:
        ValueError: A picture has changed since the folder was begun, or the teacher gives no teacher's
            features.
    """
    shard_rows, batch_size = draft.about["shard_rows"], draft.about["batch_size"]
    rows_left = {shard: len(draft.rows_of(shard)) for shard in shards if not draft.is_whole(shard)}
    # Pictures of shards that an earlier call has written may have changed since.
    written_shards = set(shards).difference(rows_left)
    rows_to_compare = [row for row in some_rows(len(draft)) if row // shard_rows in written_shards]
    draft.compare_pictures(data.pictures(rows_to_compare), str(data.about["data"]))

    groups = groups_of(data, batch_size, map(draft.rows_of, rows_left))
    batches = DataLoader(Batches(data, groups, teacher), None, num_workers=workers)
    arrays_of: dict[int, dict[str, Array]] = {}  # of each shard that is begun and not written
    total = sum(len(draft.rows_of(shard)) for shard in shards)
    written = total - sum(rows_left.values())
    with tqdm(total=total, initial=written, unit="row", disable=not shows) as bar:
        # A batch is of the rows from first up to end; of these, ``rows`` have pictures that can be read.
        for (first, end), rows, identities, prepared in batches:
            shard = first // shard_rows  # of the whole batch, since batches end with a shard
            if shard not in arrays_of:
                arrays_of[shard] = draft.empty_shard(shard)
            if rows:
                _fill(arrays_of[shard], draft, rows, identities, prepared, teacher)
            rows_left[shard] -= end - first
            if rows_left[shard] == 0:
                draft.save(shard, arrays_of.pop(shard))
            bar.update(end - first)


def _fill(
    arrays: dict[str, Array],
    draft: Draft,
    rows: list[int],
    identities: list[str],
    prepared: dict[str, Any],
    teacher: Teacher,
) -> None:
    """Fill the arrays of a shard with the features of a batch, and the hashes of its pictures.

    Args:
        arrays: The arrays of the shard.
        draft: The folder.
        rows: The rows of the batch, all of this shard.
        identities: Those of their pictures, if these were read.
        prepared: The teacher's inputs.
        teacher: The teacher.

    Raises:
        ValueError: The teacher gives no teacher's features.
    """
    places = np.array(rows) % draft.about["shard_rows"]
    if identities:
        arrays[PICTURES][places] = numbers_of(identities)
    elif teacher.stored is not None and teacher.stored.pictures is not None:
        arrays[PICTURES][places] = teacher.stored.pictures[rows]
    for name, features in teacher.encode(prepared, _PRECISIONS[draft.about["precision"]]).items():
        arrays[name][places] = features.numpy()
        where = f"the teacher's {name}, counted from row {rows[0]},"
        check_teacher(where, torch.from_numpy(arrays[name][places]), first_look=False)
