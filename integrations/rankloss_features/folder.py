"""The folder of features: its files, and how they are read.

::

    features.json         the teacher, a hash of its weights, whether images and texts have one space, widths,
                          dtype, scale, number of rows, the data
    image_features.npy    [rows, D'], float16 or float32
    text_features.npy     likewise; one of the two may be missing
    pairs.npy             [rows], uint64: the hash of each row's caption and image name
    rows.npy              [rows], uint64: the hash of each row's pair and numbers

A row's hash is written after its numbers; a row whose picture cannot be read has its pair's hash, and no
numbers. ``features.json`` has a hash of its entries, one of which is a hash of ``rows.npy`` once every row is
written. So a file that is cut, changed or from another folder is refused. Every file is written beside, under
a name that begins with a dot, and takes its name once it is whole: what a training has mapped never changes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from rankloss.checks import check_teacher
from rankloss_features.components import Components, first_components

NAMES = ("image_features", "text_features")
"""The features of a folder."""

SPACES = ("common", "separate")
"""The spaces of images and texts: one, in which they are compared; or one for each. One modality has one."""

FORMAT = 2
"""The version of the format."""

Array = np.ndarray[Any, Any]

_ABOUT = "features.json"
_BLOCK = 16_384  # rows that are read together
_PAIRS = 65_536  # pairs that are hashed together


def hash_of(data: Any) -> bytes:
    """64 bits of a hash of bytes, or of an array."""
    return hashlib.blake2b(data, digest_size=8).digest()


def hash_of_pair(caption: str, image: str) -> int:
    """The 64-bit hash of a caption and the name of its image."""
    return int.from_bytes(hash_of(f"{image}\0{caption}".encode("utf-8", "surrogatepass")), "little")


def name_of(image: object) -> str:
    """The name of an image: of bytes their hash, of a path its last part, since its folders may move."""
    return hash_of(image).hex() if isinstance(image, bytes) else os.path.basename(str(image))


def hashes_of_pairs(captions: Iterable[str], images: Iterable[str]) -> Array:
    """The hash of each pair, uint64."""
    return np.array([hash_of_pair(*pair) for pair in zip(captions, images, strict=True)], np.uint64)


def hashes_of_rows(pairs: Array, arrays: Iterable[Array]) -> Array:
    """The hash of each row: its pair's hash and its numbers in all arrays, uint64."""
    rows = zip(pairs, *arrays, strict=True)
    return np.frombuffer(b"".join(hash_of(b"".join(x.tobytes() for x in row)) for row in rows), np.uint64)


def _hash_of_entries(about: dict[str, Any]) -> str:
    return hash_of(json.dumps(about, sort_keys=True).encode()).hex()


def read_about(folder: Path) -> dict[str, Any] | None:
    """The entries of ``features.json``, or None without it.

    Raises:
        ValueError: It is of another format, or its entries are not those that were written.
    """
    file = folder / _ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not of format {FORMAT}: it is damaged, or of an earlier release, which did not tie "
            "rows to pairs. To renew the folder, delete it and give its command again"
        )
    if about.pop("hash", None) != _hash_of_entries(about):
        raise ValueError(f"{file} is damaged: its entries are not those that the command wrote")
    return about


def write_about(folder: Path, about: dict[str, Any], rows: Array | None = None) -> None:
    """Write ``features.json``, whole or not at all, with the format and the hashes.

    Args:
        folder: The folder.
        about: The other entries.
        rows: The numbers of ``rows.npy``, once every row is written.
    """
    about = {**about, "format": FORMAT, "rows_hash": None if rows is None else hash_of(rows).hex()}
    with replacing(folder / _ABOUT) as file:
        file.write((json.dumps({**about, "hash": _hash_of_entries(about)}, indent=2) + "\n").encode())


@contextmanager
def opened(file: Path, mode: str) -> Iterator[BinaryIO]:
    """A file to write, whose errors name it."""
    try:
        with open(file, mode) as written:
            yield written  # type: ignore[misc]
    except OSError as error:
        advice = "Make room, and give the same command"
        raise OSError(error.errno, f"{error.strerror}: {file}. {advice}") from error


def beside(file: Path) -> Path:
    """The name under which a file is written."""
    return file.with_name(f".{file.name}")


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A new file, which takes a file's place once it is on the disk. A link there is replaced."""
    beside(file).unlink(missing_ok=True)
    with opened(beside(file), "xb") as written:
        yield written
        written.flush()
        os.fsync(written.fileno())
    beside(file).replace(file)


def spaces_of(about: dict[str, Any]) -> str:
    """The entry ``spaces``, one of :data:`SPACES`.

    Earlier releases did not write it: their spaces are separate if the widths differ, or if the teacher is an
    encoder for each modality.
    """
    two_encoders = {"image_encoder", "text_encoder"} <= {*about.get("teacher", ())}
    separate = two_encoders or len(set(about["widths"].values())) > 1
    return str(about.get("spaces", SPACES[separate]))


def read_array(file: Path, dtype: str, shape: tuple[int, ...]) -> Array:
    """An array in a file, mapped into memory.

    Raises:
        ValueError: It cannot be read, or is of another type or shape.
    """
    try:
        array = np.asarray(np.load(file, mmap_mode="r"))  # whose rows cost less than a memmap's
    except Exception as error:  # NumPy raises many of a damaged header
        raise ValueError(f"{file} cannot be read: {error}") from error
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{file} must be {dtype} {shape}; got {array.dtype} {array.shape}")
    return array


class Pairs:
    """The pairs of a folder's rows, which are known before their features.

    Args:
        path: The folder.

    Attributes:
        about: The entries of ``features.json``.
        pairs: The hash of each row's pair.

    Raises:
        ValueError: It is no such folder, or a file is not as ``features.json`` says.
    """

    def __init__(self, path: str) -> None:
        self.path, about = path, read_about(Path(path))
        if about is None:
            raise ValueError(f"{path} is no folder of `rankloss features`: it has no {_ABOUT}")
        self.about = about
        self.pairs = read_array(Path(path, "pairs.npy"), "uint64", (about["rows"],))

    def __reduce__(self) -> Any:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return len(self.pairs)

    @functools.cached_property
    def _sorted(self) -> tuple[Array, Array]:
        order = np.argsort(self.pairs, kind="stable")
        return order, self.pairs[order]

    def find(self, pair: int) -> int | None:
        """The row of a pair, by its hash, or None."""
        order, pairs = self._sorted
        place = int(np.searchsorted(pairs, np.uint64(pair)))
        return int(order[place]) if place < len(pairs) and pairs[place] == pair else None

    def compare(self, pairs: Iterable[tuple[list[str], list[str]]], where: str, advice: str = "") -> None:
        """Compare the rows, in their order, with pairs: captions and image names, block by block.

        Args:
            pairs: The blocks.
            where: The name of the data in errors.
            advice: The end of an error about data that are shuffled, or a part of the folder's.

        Raises:
            ValueError: A row is of another pair, or missing; the error names the first.
        """
        row = 0
        for captions, images in pairs:
            found = hashes_of_pairs(captions, images)
            wanted = self.pairs[row : row + len(found)]
            if not np.array_equal(found, wanted):
                i = next(i for i, x in enumerate(found) if i >= len(wanted) or x != wanted[i])
                named = f"row {row + i} of {where}, image {images[i]!r} with caption {captions[i]!r},"
                place = self.find(found[i])
                if place is None:
                    raise ValueError(f"{named} is none of the {len(self)} rows of {self.path}")
                raise ValueError(f"{named} is row {place} of the {len(self)} of {self.path}{advice}")
            row += len(found)
        if row != len(self):
            missing = f"row {row} is missing{advice}"
            raise ValueError(f"{self.path} has {len(self)} rows, {where} has {row}: {missing}")

    def compare_columns(self, captions: Sequence[Any], images: Sequence[Any], where: str) -> None:
        """Compare the rows with two columns, the captions and the images or their paths.

        Raises:
            ValueError: As :meth:`compare`.
        """
        blocks = [slice(first, first + _PAIRS) for first in range(0, len(captions), _PAIRS)]
        pairs = (([str(x) for x in captions[block]], [name_of(x) for x in images[block]]) for block in blocks)
        self.compare(pairs, where)


class Features(Pairs):
    """A folder of a teacher's features.

    Args:
        path: The folder.

    Attributes:
        about: The entries of ``features.json``.
        arrays: The features by their names, mapped into memory.
        common_space: True if images and texts are compared in one space, or one modality is there.
        pairs: The hash of each row's pair.
        rows: The hash of each row.

    Raises:
        ValueError: It is no such folder, unfinished, or a file is not as ``features.json`` says.
    """

    drafts = False
    """True for arrays that are written, which :mod:`rankloss_features.writing` reads again."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        about, prefix = self.about, "." * self.drafts
        if not (about["complete"] or self.drafts):
            raise ValueError(
                f"{path} is unfinished: the command that began it goes on where it stopped. {_ABOUT}, which "
                f"anyone may have written, quotes it as {about.get('command')!r}"
            )
        self.common_space = spaces_of(about) == SPACES[0]
        self.arrays = {
            x: read_array(Path(path, f"{prefix}{x}.npy"), about["dtype"], (len(self), about["widths"][x]))
            for x in NAMES
            if x in about["widths"]
        }
        self.rows = read_array(Path(path, f"{prefix}rows.npy"), "uint64", (len(self),))

    def present(self, rows: Any) -> Array:
        """Presence of features per row: a picture that could not be read has none."""
        return np.asarray(self.rows[rows] != self.pairs[rows])

    def whole(self, rows: slice) -> Array:
        """Completeness per row: its hash fits its pair and numbers, or it has no features."""
        hashes = hashes_of_rows(self.pairs[rows], [x[rows] for x in self.arrays.values()])
        return np.asarray((self.rows[rows] == hashes) | ~self.present(rows))

    def take(self, rows: Array) -> dict[str, Array]:
        """The features of some rows, float32.

        Raises:
            ValueError: A row has none, since its picture could not be read.
        """
        present = self.present(rows)
        if not present.all():
            row = int(rows[present.argmin()])
            raise ValueError(f"row {row} of {self.path} has no features: its picture could not be read")
        return {name: array[rows].astype(np.float32) for name, array in self.arrays.items()}

    def components(self, width: int) -> Components:
        """The first principal components of the features, about the origin.

        They are the eigenvectors of Σ x·xᵀ over the unit-norm features x of both modalities: the projection
        to ``width`` dimensions that keeps the features' products best, and one matrix for both modalities.
        Each call reads all rows and computes them. The logger ``rankloss_features`` gets the explained
        variance.

        Args:
            width: The number of components.

        Returns:
            The matrix, ``[D', width]``, and the fraction of Σ ‖x‖² that it keeps.

        Raises:
            ValueError: Images and texts have separate spaces, ``width`` exceeds D' or the number of rows, or
                a row is not as it was written.

        Example:
            >>> Features("teacher/").components(256).matrix.shape  # doctest: +SKIP
            torch.Size([512, 256])
        """
        return first_components(self, width)

    def check(self) -> Features:
        """Read every row once, from end to end; the same folder.

        Raises:
            ValueError: A row differs from the written one, or is no teacher's.
        """
        damage = "the files are damaged, their rows in another order, or from another folder"
        for first in range(0, len(self), _BLOCK):
            rows = slice(first, first + _BLOCK)
            whole, absent = self.whole(rows), torch.from_numpy(~self.present(rows))
            for name, array in self.arrays.items():
                with np.errstate(over="ignore"):  # infinity is refused below
                    block = torch.from_numpy(array[rows].astype(np.float32))
                block[absent] = torch.arange(block.shape[1]) + 1.0
                where = f"{name} in {self.path}, counted from row {first},"
                check_teacher(where, block, first_look=False)
            if not whole.all():
                row = first + int(whole.argmin())
                raise ValueError(f"row {row} of {self.path} is not as it was written: {damage}")
        if self.about["rows_hash"] != hash_of(self.rows).hex():
            raise ValueError(f"{self.path}/rows.npy is not as it was written: {damage}")
        return self


def has_separate_spaces(where: Any) -> bool:
    """True for a folder whose images and texts have separate spaces; False where no folder is.

    Raises:
        ValueError: The folder is damaged; the error begins with the option that names it.
    """
    found = _found(where)
    return found is not None and not found.common_space


def is_of_one_model(where: Any) -> bool:
    """True for a folder whose images and texts share a space; False where no folder is.

    Raises:
        ValueError: The folder is damaged; the error begins with the option that names it.
    """
    found = _found(where)
    return found is not None and found.common_space and len(found.arrays) > 1


def _found(where: Any) -> Features | None:
    if where is None or not os.path.isdir(where):  # which the reader of features says
        return None
    try:
        return Features(where)
    except ValueError as error:
        raise ValueError(f"reference_features: {error}") from error
