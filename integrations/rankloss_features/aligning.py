"""Writes the folder of two encoders whose features are aligned: brought into one space by their pairs.

The projections are fitted to all pairs of the folder (:mod:`rankloss_features.tuning` chooses their setting),
and kept in it, so that they serve for new pairs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloss_features import probing
from rankloss_features.cca import FEWEST
from rankloss_features.data import Data, some_rows
from rankloss_features.errors import named_errors
from rankloss_features.folder import (
    ALIGNMENT,
    COMMON_SPACE,
    NAMES,
    PICTURES,
    Array,
    Draft,
    Features,
    hash_of,
    read_about,
)
from rankloss_features.teachers import Encoder, Teacher
from rankloss_features.tuning import tuned
from rankloss_features.writing import (
    check_has_no_files,
    check_is_of,
    check_probe,
    join_processes,
    make_folder,
    only_writer,
    write,
)

_ENCODED = ".encoders"
"""The folder of the encoders' own features, in that of the aligned ones while it is written."""

_SHARED = (
    "teacher",
    "pictures",
    "dtype",
    "precision",
    "batch_size",
    "shard_rows",
    "data",
    "has_picture_hashes",
    "probe",
)
"""The entries of ``folder.json`` that an aligned folder takes from the folder of its encoders' features.

A folder of an earlier release may lack some; ``dtype`` and ``shard_rows`` are always there.
"""

_IMAGES, _TEXTS = NAMES


def write_aligned(output: Path, data: Data, teacher: Teacher, settings: dict[str, Any], workers: int) -> None:
    """Write the aligned features of all pairs into a folder, fitted to these pairs.

    The encoders' own features come first, as :func:`rankloss_features.writing.write` writes them, in a hidden
    folder inside, which is deleted in the end. Interrupted, the same command goes on.

    Args:
        output: The folder.
        data: The pairs.
        teacher: The encoders.
        settings: As for :func:`rankloss_features.writing.write`.
        workers: Likewise.

    Raises:
        ValueError: As there; the features cannot be aligned, or the pairs are too few, which is known before
            they are encoded.
        OSError: As there.
    """
    check_pairs_suffice(data)
    rank, world = join_processes()
    is_first = rank == 0
    if is_first:
        make_folder(output)
    with only_writer(output / ".lock", output) if is_first else nullcontext():
        is_complete = is_first and _is_complete(output, data, teacher, settings)
        if world > 1:  # the others wait here for the answer of the first
            answer = [is_complete]
            torch.distributed.broadcast_object_list(answer)
            (is_complete,) = answer
        if is_complete:
            if is_first:  # which a command that was killed may have left
                shutil.rmtree(output / _ENCODED, ignore_errors=True)
            return
        write(output / _ENCODED, data, teacher, settings, workers)
        if is_first:
            align(Features(str(output / _ENCODED)), data, output, settings["command"])
            shutil.rmtree(output / _ENCODED)


def check_pairs_suffice(data: Data) -> None:
    """Raise a ValueError for fewer pairs than :data:`rankloss_features.cca.FEWEST`, too few to fit."""
    pairs = 0
    for block in data.pairs():
        pairs += len(block.captions)
        if pairs >= FEWEST:
            return
    place = data.about["data"]
    raise ValueError(f"{place} has {pairs} pairs: at least {FEWEST} bring two encoders into one space")


def _is_complete(output: Path, data: Data, teacher: Teacher, settings: dict[str, Any]) -> bool:
    """True for a complete folder of these features; False for one that is empty or unfinished.

    Raises:
        ValueError: It holds something else, or features of other pairs, another teacher or other settings; it
            was begun without ``--align``; or it is damaged.
    """
    entries = read_about(output)
    if entries is None:
        check_has_no_files(output)
        return False

    # A folder that is there must be of this command, finished or not.
    rendering = asdict(teacher.rendering or data.rendering)
    wanted = {"teacher": teacher.about, "pictures": rendering, "spaces": COMMON_SPACE, **settings}
    check_is_of(output, entries, wanted)
    if "alignment" not in entries:
        raise ValueError(f"--output {output} was begun without --align")
    check_probe(output, entries, teacher)
    if not entries["complete"]:
        return False

    # A finished one must be undamaged, and of these pairs and pictures.
    features = Features(str(output)).check()
    name_of_data = str(data.about["data"])
    features.compare(data.pairs(), name_of_data)
    features.compare_pictures(data.pictures(some_rows(len(features))), name_of_data)
    return True


def align(encoded: Features, data: Data, output: Path, command: str) -> None:
    """Write the aligned features of a folder of two encoders.

    Args:
        encoded: Their own features.
        data: The pairs of the folder, which tell the rows of one picture.
        output: The folder of the aligned ones; what an interrupted command has left there is replaced.
        command: The entry of ``folder.json``.

    Raises:
        ValueError: As :func:`rankloss_features.tuning.tuned`.
        OSError: The disk is full, or the folder cannot be written.
    """
    images, texts = encoded.arrays[_IMAGES], encoded.arrays[_TEXTS]
    has_features = np.concatenate([shard.any(axis=1) for shard in images.shards])
    rows_with_features = np.flatnonzero(has_features)

    def take(numbers: Array) -> tuple[Tensor, Tensor]:
        """Features of rows by their numbers among those with features, which :func:`tuned` asks for."""
        rows = rows_with_features[numbers]
        return torch.from_numpy(images[rows]), torch.from_numpy(texts[rows])

    cca = tuned(take, _picture_of_each_row(encoded, data)[rows_with_features]).cca
    about = {
        **{key: encoded.about[key] for key in _SHARED if key in encoded.about},
        "command": command,
        "scale": None,
        "spaces": COMMON_SPACE,
        "widths": dict.fromkeys(NAMES, len(cca.correlations)),
    }
    Draft.begin(output, about, encoded.pairs, cca)
    draft = Draft(str(output))
    project = {_IMAGES: cca.images, _TEXTS: cca.texts}
    for shard in draft.shards:
        arrays = {}
        for name in NAMES:
            rows_of_encoder = encoded.arrays[name].shards[shard]
            arrays[name] = _projected(project[name], rows_of_encoder, about["dtype"])
        if encoded.pictures is not None:
            arrays[PICTURES] = encoded.pictures.shards[shard]
        draft.save(shard, arrays)
    draft.finish()


def _picture_of_each_row(encoded: Features, data: Data) -> Array:
    """A number for each row, equal where rows have one picture.

    Pictures are told apart by their content, or by their names where no encoder has read them.
    """
    if encoded.pictures is not None:
        return encoded.pictures[:]
    hashes = bytearray()  # of 64 bits each; it grows in place
    for block in data.pairs():
        for picture in block.pictures:
            hashes += hash_of(picture.encode("utf-8", "surrogatepass"), 8)
    return np.frombuffer(hashes, np.uint64)


def _projected(project: Callable[[Tensor], Tensor], rows: Array, dtype: str) -> Array:
    """The rows of a shard in the common space, in a dtype of the folder; rows without features stay zero."""
    has_features = rows.any(axis=1)
    projected = project(torch.from_numpy(rows[has_features])).numpy()
    aligned = np.zeros((len(rows), projected.shape[1]), dtype)
    aligned[has_features] = projected
    return aligned


def aligned_teacher(teacher: Teacher, folder: str) -> Teacher:
    """Encoders with the projections of a folder, for new pairs.

    Raises:
        ValueError: It is no aligned folder, or one of other encoders, by their names or by what they compute.
    """
    with named_errors(f"--align {folder}"):
        features = Features(folder)
        cca = features.alignment
    if cca is None:
        raise ValueError(f"--align {folder} has no projections: it was written without --align")
    for name, value in teacher.about.items():
        fitted = features.about["teacher"].get(name)
        if fitted != value:
            raise ValueError(
                f"--align {folder} has the projections of other encoders, of {name} {fitted!r}; these have "
                f"{value!r}"
            )
    # An encoder of the same name may compute other features: those of a fixed input are compared.
    remedy = ". Restore it, or align the new one: its projections are others"
    probing.check_same_as_in_folder(f"--align {folder}", features.about, teacher, remedy)
    project = {_IMAGES: cca.images, _TEXTS: cca.texts}
    width = len(cca.correlations)
    encoders = {
        name: _with_projection(encoder, project[name], width) for name, encoder in teacher.encoders.items()
    }
    about = {**teacher.about, "alignment": features.about["files"][ALIGNMENT]}
    return replace(teacher, about=about, encoders=encoders, spaces=COMMON_SPACE)


def _with_projection(encoder: Encoder, project: Callable[[Tensor], Tensor], width: int) -> Encoder:
    """An encoder, followed by a projection of its features to ``width`` dimensions."""

    def encode(inputs: Any) -> Tensor:
        return project(encoder.encode(inputs).float())

    return replace(encoder, encode=encode, width=width)
