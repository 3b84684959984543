"""The folder of features: what is in it, and how it is read.

::

    features.json         the teacher, a hash of its weights, widths, dtype, scale, number of rows, the data
    image_features.npy    [rows, D'], float16 or float32
    text_features.npy     likewise; one of the two may be missing
    pairs.npy             [rows], uint64: the hash of each row's caption and image name
    rows.npy              [rows], uint64: the hash of each row's numbers

A row's own hash is written after its numbers, so a row that was half written, moved or damaged does not pass
for a whole one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankloss.checks import check_teacher

NAMES = ("image_features", "text_features")
"""The features of a folder."""

SKIPPED = 1
"""The hash of a row whose picture cannot be read. The trainer skips such samples of a webdataset, too."""

Array = np.ndarray[Any, Any]

_ABOUT = "features.json"
_BLOCK = 16_384  # rows that are looked at together


def hash_of_pair(caption: str, image: str) -> int:
    """The 64-bit hash of a caption and the name of its image."""
    text = f"{image}\0{caption}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def name_of(image: object) -> str:
    """The name of an image, of its path: folders move."""
    return os.path.basename(str(image))


def hashes_of_pairs(captions: Iterable[str], images: Iterable[str]) -> Array:
    """The hash of each pair, uint64."""
    return np.array([hash_of_pair(*pair) for pair in zip(captions, images, strict=True)], np.uint64)


def hashes_of_rows(arrays: Iterable[Array]) -> Array:
    """The hash of each row's numbers, in all arrays together, uint64."""
    digests = [
        hashlib.blake2b(b"".join(x.tobytes() for x in row), digest_size=8).digest()
        for row in zip(*arrays, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What ``features.json`` says, or None without it.

    Raises:
        ValueError: It cannot be read as JSON.
    """
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{folder / _ABOUT} cannot be read: {error}") from error
    return about


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``features.json``, whole or not at all."""
    partial = folder / f".{_ABOUT}"
    partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _ABOUT)


class Features:
    """A finished folder of a teacher's features.

    Args:
        path: The folder.

    Attributes:
        about: What ``features.json`` says.
        arrays: The features by their names, mapped into memory.
        pairs: The hash of each row's pair.

    Raises:
        ValueError: It is no such folder, unfinished, or its files are not those that it names.
    """

    def __init__(self, path: str) -> None:
        folder, self.path = Path(path), path
        about = read_about(folder) if folder.is_dir() else None
        if about is None:
            raise ValueError(f"{path} is no folder of `rankloss features`: it has no {_ABOUT}")
        missing = {"complete", "widths", "rows", "dtype"} - about.keys()
        if missing:
            raise ValueError(f"{folder / _ABOUT} is not of `rankloss features`: it has no {min(missing)}")
        if not about["complete"]:
            raise ValueError(
                f"{path} is unfinished: the command that began it goes on where it stopped. It was: "
                f"{about['command']}"
            )
        self.about = about
        self.arrays = {
            x: self._array(x, about["dtype"], (about["rows"], n)) for x, n in about["widths"].items()
        }
        self.pairs = self._array("pairs", "uint64", (about["rows"],))
        self._rows = self._array("rows", "uint64", (about["rows"],))

    def __reduce__(self) -> Any:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return len(self.pairs)

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        file = Path(self.path, f"{name}.npy")
        try:
            array: Array = np.asarray(np.load(file, mmap_mode="r"))  # whose rows cost less than a memmap's
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{file} must be {dtype} {shape}, as {_ABOUT} says; got {array.dtype} {array.shape}"
            )
        return array

    @functools.cached_property
    def _sorted(self) -> tuple[Array, Array]:
        order = np.argsort(self.pairs, kind="stable")
        return order, self.pairs[order]

    def find(self, pair: int) -> int | None:
        """The row of a pair, by its hash, or None."""
        order, pairs = self._sorted
        place = int(np.searchsorted(pairs, np.uint64(pair)))
        return int(order[place]) if place < len(pairs) and int(pairs[place]) == pair else None

    def compare(self, pairs: Iterable[tuple[list[str], list[str]]], where: str) -> None:
        """Compare the rows, in their order, with pairs: captions and image names, block by block.

        Args:
            pairs: The blocks.
            where: What the error calls them.

        Raises:
            ValueError: A row is of another pair, or missing; the error names the first.
        """
        row = 0
        for captions, images in pairs:
            found = hashes_of_pairs(captions, images)
            wanted = self.pairs[row : row + len(found)]
            wrong = np.ones(len(found), bool)
            wrong[: len(wanted)] = found[: len(wanted)] != wanted
            if wrong.any():
                i = int(wrong.argmax())
                held = f"{len(self)} rows" if row + i >= len(self) else "another pair there"
                other = self.find(int(found[i]))
                raise ValueError(
                    f"row {row + i} of {where}, image {images[i]!r} with caption {captions[i]!r}, is not row "
                    f"{row + i} of {self.path}, which has {held}"
                    + ("" if other is None else f", and this pair in row {other}")
                )
            row += len(found)
        if row != len(self):
            raise ValueError(f"{self.path} has {len(self)} rows, {where} has {row}: row {row} is missing")

    def take(self, rows: Array) -> dict[str, Array]:
        """The features of some rows, float32.

        Raises:
            ValueError: A row has none, since its picture could not be read.
        """
        missing = self._rows[rows] == SKIPPED
        if missing.any():
            row = int(rows[missing.argmax()])
            raise ValueError(f"row {row} of {self.path} has no features: its picture could not be read")
        return {name: array[rows].astype(np.float32) for name, array in self.arrays.items()}

    def of_bound(self, bound: Array) -> dict[str, Array]:
        """The features of rows that :func:`rankloss_features.bind` named, ``[N, 2]``: their row and pair.

        Raises:
            ValueError: They were bound to another folder.
        """
        rows, pairs = bound[:, 0], bound[:, 1].view(np.uint64)
        inside = (rows >= 0) & (rows < len(self))
        right = inside & (self.pairs[np.where(inside, rows, 0)] == pairs)
        if not right.all():
            row = int(rows[right.argmin()])
            raise ValueError(
                f"row {row} of the data is not row {row} of {self.path}: bind the data to this folder"
            )
        return self.take(rows)

    def blocks(self) -> Iterator[tuple[int, Array, dict[str, Array]]]:
        """All rows in parts: the first row, which rows have features, and these.

        The files are mapped anew for each part, or what was read would stay in memory.
        """
        for first in range(0, len(self), _BLOCK):
            files = {name: Path(self.path, f"{name}.npy") for name in self.arrays}
            arrays = {x: np.load(file, mmap_mode="r")[first : first + _BLOCK] for x, file in files.items()}
            yield first, self._rows[first : first + _BLOCK] != SKIPPED, arrays

    def check(self) -> Features:
        """Read every row once, from end to end; the same folder.

        Raises:
            ValueError: A row is not what was written, or not what a teacher gives.
        """
        for first, present, arrays in self.blocks():
            for name, array in arrays.items():
                with np.errstate(over="ignore"):
                    block = torch.from_numpy(array.astype(np.float32))
                block[~torch.from_numpy(present)] = torch.arange(block.shape[1]) + 1.0  # has no features
                where = f"{name} in {self.path}, counted from row {first},"
                check_teacher(where, block, first_look=False)
            written = self._rows[first : first + len(present)]
            wrong = present & (hashes_of_rows(arrays.values()) != written)
            if wrong.any():
                raise ValueError(
                    f"row {first + int(wrong.argmax())} of {self.path} does not hold what was written there: "
                    "the files are damaged, their rows in another order, or from another folder"
                )
        return self


@functools.lru_cache(maxsize=1)
def opened(path: str) -> Features:
    """The folder, opened once per process."""
    return Features(path)
