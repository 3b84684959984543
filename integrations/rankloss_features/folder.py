"""The folder of features: its files, and their readers.

::

    folder.json                the teacher, a hash of its weights, its features of fixed inputs (``probe``),
                               whether images and texts have one space, widths, dtype, scale, counts, the
                               data, and a hash of each other file
    pairs.npy                  [rows], uint64: the hash of each row's caption and picture, the latter by its
                               name, or without a name of its own, as in shards, by its content
    image_features-00000.npy   [shard_rows, D'], float16 or float32: the first shard; the last may be shorter
    text_features-00000.npy    likewise; one of the two modalities may be missing
    pictures-00000.npy         [shard_rows], uint64: the hash of each row's picture by its content, 0 where it
                               cannot be read; missing where the teacher reads no pictures
    alignment.safetensors      of --align: the projections of two encoders' features into one space

A row of zeros has no features, since its picture cannot be read. ``folder.json`` has a hash of its own
entries, too, so a file that is cut, changed or from another folder is refused, and named. While the folder is
unfinished, the hashes of each shard's files are in ``shard-00000.json``, written once these are on the disk.
Every file is written beside, under a name that begins with a dot, and takes its name once it is whole: what a
training has mapped never changes.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch

from rankloss.checks import FEWEST_THAT_DIFFER
from rankloss_features.cca import CanonicalCorrelation, Setting
from rankloss_features.components import Components, first_components
from rankloss_features.opening import tensors_of

NAMES = ("image_features", "text_features")
"""The features of a folder."""

COMMON_SPACE = "common"
"""One space, in which images and texts are compared, or of the only modality."""

SEPARATE_SPACES = "separate"
"""A space of images and another of texts."""

SPACES = (COMMON_SPACE, SEPARATE_SPACES)
"""The spaces of a folder's features."""

PICTURES = "pictures"
"""The hashes of the pictures' content, beside the features of a shard."""

FORMAT = 4
"""The version of the format."""

Array = np.ndarray[Any, Any]

ABOUT, PAIRS = "folder.json", "pairs.npy"
ALIGNMENT = "alignment.safetensors"
"""The projections of an aligned folder, whose setting is the entry ``alignment`` of ``folder.json``."""

_EARLIER = "features.json"  # of formats 1 and 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 65_536  # pairs that are hashed together


# --- hashes -----------------------------------------------------------------------------------------------


def hash_of(data: Any, size: int = 16) -> bytes:
    """The hash, of ``size`` bytes, of bytes or of an array's memory."""
    return hashlib.blake2b(data, digest_size=size).digest()


def identity_of(content: bytes) -> str:
    """The identity of a picture: a hash of its content, as hexadecimal digits."""
    return hash_of(content).hex()


def numbers_of(identities: Sequence[str]) -> Array:
    """The first 64 bits of identities, uint64."""
    return np.array([int(identity[:16], 16) for identity in identities], np.uint64)


def hash_of_pair(caption: str, image: str) -> int:
    """The 64-bit hash of a caption and the name of its image."""
    return int.from_bytes(hash_of(f"{image}\0{caption}".encode("utf-8", "surrogatepass"), 8), "little")


def common_folder(paths: Sequence[str]) -> str:
    """The folder that holds all these files, with its last slash; empty if there is none.

    Example:
        >>> common_folder(["data/p0/front.png", "data/p1/front.png"])
        'data/'
    """
    if not paths:
        return ""
    first, last = min(paths), max(paths)  # all paths between them in the alphabet begin as both do
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    folder, slash, _ = first[:length].rpartition("/")
    return folder + slash


def name_of(image: object, folder: str = "") -> str:
    """The name of an image: of bytes their identity; of a path its part below the folder of all images.

    That folder may move, and the images keep their names. Images of one file name in two folders have two.

    Args:
        image: Its bytes or its path.
        folder: The :func:`common_folder` of all images.
    """
    return identity_of(image) if isinstance(image, bytes) else str(image).removeprefix(folder)


def possible_names(path: str) -> list[str]:
    """The names that an image may have by the folder of all images, which one image does not tell.

    Example:
        >>> possible_names("data/p0/front.png")
        ['data/p0/front.png', 'p0/front.png', 'front.png']
    """
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


class PairBlock(NamedTuple):
    """Some pairs of data, one after the other.

    Attributes:
        captions: Their captions.
        names: The names of their pictures, for messages.
        pictures: The names by which :func:`hash_of_pair` knows them: the same, or in shards the identities of
            their content.
    """

    captions: list[str]
    names: list[str]
    pictures: list[str]


def hashes_of_pairs(captions: Iterable[str], images: Iterable[str]) -> Array:
    """The hash of each pair, uint64."""
    return np.array([hash_of_pair(*pair) for pair in zip(captions, images, strict=True)], np.uint64)


# --- files ------------------------------------------------------------------------------------------------


def draft_path(file: Path) -> Path:
    """The name under which a file is written."""
    return file.with_name(f".{file.name}")


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A new file, which takes a file's place once it is on the disk. A link there is replaced.

    Raises:
        OSError: The disk is full, the file too large, a quota used up.
    """
    draft = draft_path(file)
    draft.unlink(missing_ok=True)
    try:
        with open(draft, "xb") as written:
            yield written
            written.flush()
            os.fsync(written.fileno())
    except OSError as error:
        if error.errno in _FULL:
            text = f"{error.strerror}: {file} cannot be written. Make room, and give the same command"
            raise OSError(error.errno, text) from error
        raise
    draft.replace(file)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; what is no regular file, ``/dev/stdout`` say, is written as it is.

    Raises:
        OSError: As :func:`replacing`.
    """
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    with replacing(file) as written:
        written.write(content)


def header_of(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of an array's file."""
    entries = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, entries)
    return file.getvalue()


def write_array(file: Path, array: Array) -> str:
    """Write an array, as :func:`numpy.save` does, and return the hash of its numbers."""
    array = np.ascontiguousarray(array)
    with replacing(file) as written:
        written.write(header_of(str(array.dtype), array.shape))
        written.write(array.data)
    return hash_of(array).hex()


def read_array(file: Path, dtype: str, shape: tuple[int, ...]) -> Array:
    """An array in a file, mapped into memory; it takes no file descriptor.

    Raises:
        ValueError: It cannot be read, or is of another type, shape or size.
    """
    header = header_of(dtype, shape)
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError("it is no regular file")
        size = file.stat().st_size
        mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    right_size = len(header) + np.dtype(dtype).itemsize * math.prod(shape)
    if size != right_size or bytes(mapped[: len(header)]) != header:
        raise ValueError(f"{file} is damaged: it is no array of {dtype} {shape}")
    array = mapped[len(header) :].view(dtype).reshape(shape)
    array.flags.writeable = False
    return array


def _hash_of_entries(about: dict[str, Any]) -> str:
    """The hash of the entries of ``folder.json``, which it has beside them."""
    return hash_of(json.dumps(about, sort_keys=True).encode()).hex()


def read_about(folder: Path) -> dict[str, Any] | None:
    """The entries of ``folder.json``, or None without it.

    Raises:
        ValueError: It is of another format, its entries are not those that were written, or one is missing or
            not of its kind: another may have made the folder.
    """
    file = folder / ABOUT if os.path.lexists(folder / ABOUT) else folder / _EARLIER
    if not os.path.lexists(file):
        return None
    about = read_json(file)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        command = about.get("command") if isinstance(about, dict) else None
        raise ValueError(
            f"{file} is damaged, or of an earlier release: its format is not {FORMAT}. To renew the folder, "
            f"delete it and give its command again, {command!r} by its own account"
        )
    if about.pop("hash", None) != _hash_of_entries(about):
        raise ValueError(f"{file} is damaged: its entries are not those that the command wrote")
    _check_entries(file, about)
    return about


def read_json(file: Path) -> Any:
    """The content of a regular JSON file.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def is_count(value: Any) -> bool:
    """True for an integer from 1."""
    return type(value) is int and value > 0


def are_widths(value: Any) -> bool:
    """True for widths by the names of their features, of one modality or both."""
    if not isinstance(value, dict) or not value:
        return False
    return set(value).issubset(NAMES) and all(map(is_count, value.values()))


def _are_hashes(value: Any) -> bool:
    """True for hashes as texts, by the names of their files."""
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def _is_probe(value: Any) -> bool:
    """True for features by their names, each a text of float16 numbers, four hexadecimal digits for each."""
    if not isinstance(value, dict) or not set(value).issubset(NAMES):
        return False
    texts = value.values()
    return all(isinstance(text, str) and re.fullmatch("([0-9a-f]{4})+", text) for text in texts)


def is_setting(value: Any) -> bool:
    """True for the options of a :class:`rankloss_features.cca.Setting`."""
    try:
        Setting(**value)
    except (TypeError, ValueError):
        return False
    return True


Entries: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]
"""A check of each entry of a JSON file, and its kind in words."""

_ENTRIES: Entries = {
    "rows": (is_count, "a number of rows from 1"),
    "shard_rows": (is_count, "a number of rows from 1"),
    "complete": (lambda value: isinstance(value, bool), "true or false"),
    "dtype": (lambda value: value in ("float16", "float32"), "float16 or float32"),
    "spaces": (lambda value: value in SPACES, " or ".join(SPACES)),
    "widths": (are_widths, f"a width from 1 for {NAMES[0]}, {NAMES[1]} or both"),
    "files": (_are_hashes, "a hash for each file"),
}
_OPTIONAL_ENTRIES: Entries = {
    "skipped": (lambda value: type(value) is int and value >= 0, "a number of rows"),
    "teacher": (lambda value: isinstance(value, dict), "the teacher's entries"),
    "data": (lambda value: isinstance(value, dict), "the data's entries"),
    "has_picture_hashes": (lambda value: isinstance(value, bool), "true or false"),
    "pictures": (lambda value: isinstance(value, dict), "the way to pictures"),
    "command": (lambda value: isinstance(value, str), "a command"),
    "probe": (_is_probe, "features of fixed inputs, in hexadecimal digits"),
    "alignment": (is_setting, "a setting of the alignment"),
}


def _check_entries(file: Path, about: dict[str, Any]) -> None:
    """Raise a ValueError for the first entry of ``folder.json`` that is missing, or not of its kind."""
    check_entries(file, about, _ENTRIES)
    if about["complete"]:  # the skipped rows are counted when a folder is finished
        check_entries(file, about, {"skipped": _OPTIONAL_ENTRIES["skipped"]})
    present = {name: entry for name, entry in _OPTIONAL_ENTRIES.items() if name in about}
    check_entries(file, about, present)


def check_entries(file: Path, about: Any, entries: Entries) -> None:
    """Raise a ValueError for the first entry of a JSON file that is missing, or not of its kind."""
    if not isinstance(about, dict):
        raise ValueError(f"{file} is damaged: it has no entries")
    for name, (is_right, kind) in entries.items():
        if name not in about:
            raise ValueError(f"{file} is damaged: it has no entry {name!r}")
        if not is_right(about[name]):
            raise ValueError(f"{file} is damaged: {name!r} must be {kind}; got {about[name]!r}")


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``folder.json``, whole or not at all, with the format and the hash of its entries."""
    about = {**about, "format": FORMAT}
    with replacing(folder / ABOUT) as file:
        file.write((json.dumps({**about, "hash": _hash_of_entries(about)}, indent=2) + "\n").encode())


# --- readers ----------------------------------------------------------------------------------------------


def check_rows_differ(name: str, shards: Iterable[Array]) -> None:
    """Raise a ValueError if all rows of a modality are one, as those of a damaged teacher.

    Neighbours may be equal, since captions and pictures repeat, and so may fewer than
    :data:`rankloss.checks.FEWEST_THAT_DIFFER` rows; rows of zeros have no features and do not count. Reading
    stops at the first row that differs.
    """
    first: Array | None = None
    count = 0
    for rows in shards:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            block = block[block.any(axis=1)]  # without rows of zeros
            if not len(block):
                continue
            first = block[0] if first is None else first
            if (block != first).any():
                return
            count += len(block)
    if count >= FEWEST_THAT_DIFFER:
        raise ValueError(f"{name} must not be one row {count} times, which ranks nothing")


class Rows:
    """The rows of one modality, or the hashes of the pictures, mapped into memory.

    Args:
        shards: The arrays of its files, of which the last may be shorter.

    Attributes:
        shape: ``(rows, D')``, or ``(rows,)`` of hashes.
        dtype: The numbers' type.
    """

    def __init__(self, shards: Sequence[Array]) -> None:
        self.shards = shards
        self.shape: tuple[int, ...] = (sum(map(len, shards)), *shards[0].shape[1:])
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        """A copy of some rows.

        Args:
            rows: A slice, a number or an array of numbers, from 0.

        Raises:
            IndexError: There is no such row.
        """
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if rows.size and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows must be integers from 0 to {len(self) - 1}; got {rows}")
        rows_of_shard = len(self.shards[0])
        shard_of_row, place_in_shard = np.divmod(rows, rows_of_shard)
        taken = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for shard in np.unique(shard_of_row):
            is_in_shard = shard_of_row == shard
            taken[is_in_shard] = self.shards[shard][place_in_shard[is_in_shard]]
        return taken


class Pairs:
    """The pairs of a folder's rows, which are known before their features.

    Args:
        path: The folder.

    Attributes:
        about: The entries of ``folder.json``.
        pairs: The hash of each row's pair.

    Raises:
        ValueError: It is no such folder, or a file is not as ``folder.json`` says.
    """

    def __init__(self, path: str) -> None:
        self.path, about = path, read_about(Path(path))
        if about is None:
            raise ValueError(f"{path} is no folder of `rankloss features`: it has no {ABOUT}")
        self.about = about
        self.pairs = read_array(Path(path, PAIRS), "uint64", (about["rows"],))

    def __reduce__(self) -> Any:
        return type(self), (self.path,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(math.ceil(len(self) / self.about["shard_rows"]))

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        size = self.about["shard_rows"]
        return range(shard * size, min((shard + 1) * size, len(self)))

    def files_of(self, shard: int) -> dict[str, Path]:
        """The files of a shard, by the names of their features, and :data:`PICTURES`."""
        names = [name for name in NAMES if name in self.about["widths"]]
        if self.about.get("has_picture_hashes"):
            names.append(PICTURES)
        return {name: Path(self.path, f"{name}-{shard:05}.npy") for name in names}

    def form_of(self, name: str, shard: int) -> tuple[str, tuple[int, ...]]:
        """The type and the shape of the array in a file of a shard."""
        rows = len(self.rows_of(shard))
        if name == PICTURES:
            return "uint64", (rows,)
        return self.about["dtype"], (rows, self.about["widths"][name])

    def read_shard(self, shard: int) -> dict[str, Array]:
        """The features of a shard, and the hashes of its pictures.

        Raises:
            ValueError: A file is missing, or of another type, shape or size.
        """
        files = self.files_of(shard).items()
        return {name: read_array(file, *self.form_of(name, shard)) for name, file in files}

    def check_hash(self, name: str, content: Any) -> None:
        """Compare the content of a file, or its array, with its hash.

        Raises:
            ValueError: It is not as it was written.
        """
        if hash_of(content).hex() != self.about["files"].get(name):
            raise ValueError(
                f"{Path(self.path, name)} is not as it was written: it is damaged, its rows are in another "
                "order, or it is from another folder"
            )

    @functools.cached_property
    def _sorted(self) -> tuple[Array, Array]:
        """The rows in the order of their pairs' hashes, and the hashes in this order."""
        rows = np.argsort(self.pairs, kind="stable")
        return rows, self.pairs[rows]

    def find(self, pair: int) -> int | None:
        """The row of a pair, by its hash, or None."""
        rows, hashes = self._sorted
        place = int(np.searchsorted(hashes, np.uint64(pair)))
        is_there = place < len(hashes) and hashes[place] == pair
        return int(rows[place]) if is_there else None

    def compare(self, pairs: Iterable[PairBlock], where: str, advice: str = "") -> None:
        """Compare the rows, in their order, with pairs, block by block.

        Args:
            pairs: The blocks.
            where: The name of the data in errors.
            advice: The end of an error about data that are shuffled, or a part of the folder's.

        Raises:
            ValueError: A row is of another pair, or missing; the error names the first.
        """
        row = 0
        for captions, names, pictures in pairs:
            hashes = hashes_of_pairs(captions, pictures)
            expected = self.pairs[row : row + len(hashes)]
            if not np.array_equal(hashes, expected):
                place = _first_difference(hashes, expected)
                named = (
                    f"row {row + place} of {where}, image {names[place]!r} with caption {captions[place]!r},"
                )
                row_in_folder = self.find(hashes[place])
                if row_in_folder is None:
                    raise ValueError(f"{named} is none of the {len(self)} rows of {self.path}")
                raise ValueError(f"{named} is row {row_in_folder} of the {len(self)} of {self.path}{advice}")
            row += len(hashes)
        if row != len(self):
            missing = f"row {row} is missing{advice}"
            raise ValueError(f"{self.path} has {len(self)} rows, {where} has {row}: {missing}")

    def compare_columns(self, captions: Sequence[Any], images: Sequence[Any], where: str) -> None:
        """Compare the rows with two columns, the captions and the images or their paths.

        Raises:
            ValueError: As :meth:`compare`.
        """
        folder = common_folder([str(image) for image in images if not isinstance(image, bytes)])

        def blocks() -> Iterator[PairBlock]:
            for first in range(0, len(captions), _BLOCK):
                block = slice(first, first + _BLOCK)
                names = [name_of(image, folder) for image in images[block]]
                yield PairBlock([str(caption) for caption in captions[block]], names, names)

        self.compare(blocks(), where)

    def compare_pictures(self, pictures: Iterable[tuple[int, str, bytes]], where: str) -> None:
        """Compare pictures with those that the teacher has read, by their content.

        Nothing is compared where the teacher has read none.

        Args:
            pictures: The row, the name and the content of each.
            where: The name of the data in errors.

        Raises:
            ValueError: A picture is another than the teacher's, although it has the name.
        """
        for row, name, content in pictures:
            wanted = self._hash_of_picture(row)
            if wanted is not None and wanted != numbers_of([identity_of(content)])[0]:
                raise ValueError(
                    f"row {row} of {where}: the picture {name!r} is not the one that the features of "
                    f"{self.path} are of. If the new one is right, delete the folder and give its command "
                    f"again, {self.about.get('command')!r} by its own account"
                )

    def _hash_of_picture(self, row: int) -> Any:
        """The hash of a row's picture by its content, or None if the teacher has read none."""
        shard, place = divmod(row, self.about["shard_rows"])
        file = self.files_of(shard).get(PICTURES)
        return None if file is None else read_array(file, *self.form_of(PICTURES, shard))[place]


def _first_difference(hashes: Array, expected: Array) -> int:
    """The first place where hashes differ from those that are expected, which may be fewer."""
    both = min(len(hashes), len(expected))
    differs = np.flatnonzero(hashes[:both] != expected[:both])
    return int(differs[0]) if len(differs) else both


class Features(Pairs):
    """A folder of a teacher's features.

    Args:
        path: The folder.

    Attributes:
        about: The entries of ``folder.json``.
        arrays: The features by their names, :class:`Rows`.
        common_space: True if images and texts are compared in one space, or one modality is there.
        pairs: The hash of each row's pair.
        pictures: The hash of each row's picture by its content, :class:`Rows`; None without.

    Raises:
        ValueError: It is no such folder, unfinished, or a file is not as ``folder.json`` says.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        if not self.about["complete"]:
            raise ValueError(
                f"{path} is unfinished: the command that began it goes on where it stopped. {ABOUT}, which "
                f"anyone may have written, quotes it as {self.about.get('command')!r}"
            )
        self.common_space = self.about["spaces"] == COMMON_SPACE
        shards = [self.read_shard(shard) for shard in self.shards]
        rows_of = {name: Rows([shard[name] for shard in shards]) for name in shards[0]}
        self.pictures = rows_of.pop(PICTURES, None)
        self.arrays = rows_of
        for name, rows in self.arrays.items():
            check_rows_differ(f"{name} of {path}", rows.shards)

    def take(self, rows: Array) -> dict[str, Array]:
        """The features of some rows, float32.

        Raises:
            ValueError: A row has none, since its picture could not be read.
        """
        taken = {name: array[rows].astype(np.float32) for name, array in self.arrays.items()}
        for features in taken.values():
            has_features = features.any(axis=1)
            if not has_features.all():
                row = int(rows[has_features.argmin()])
                raise ValueError(f"row {row} of {self.path} has no features: its picture could not be read")
        return taken

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

    @functools.cached_property
    def alignment(self) -> CanonicalCorrelation | None:
        """The projections of an aligned folder, for new pairs; None of any other.

        They take the features of the encoders that the entry ``teacher`` names.

        Raises:
            ValueError: Their file is not as it was written.
        """
        if "alignment" not in self.about:
            return None
        file = Path(self.path, ALIGNMENT)
        content = file.read_bytes() if file.is_file() else b""  # a pipe would be waited for
        self.check_hash(ALIGNMENT, content)
        try:
            return CanonicalCorrelation.of_tensors(Setting(**self.about["alignment"]), tensors_of(content))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def check(self) -> Features:
        """Read every file once, from end to end; the same folder.

        Raises:
            ValueError: A file is not as it was written.
        """
        self.check_hash(PAIRS, self.pairs)
        _ = self.alignment  # whose file is checked as it is read
        rows_of = dict(self.arrays)
        if self.pictures is not None:
            rows_of[PICTURES] = self.pictures
        for shard in self.shards:
            for name, file in self.files_of(shard).items():
                self.check_hash(file.name, rows_of[name].shards[shard])
        return self

    def _hash_of_picture(self, row: int) -> Any:
        return None if self.pictures is None else self.pictures[row]


class Draft(Pairs):
    """A folder that is written."""

    @staticmethod
    def begin(
        output: Path, about: dict[str, Any], pairs: Array, alignment: CanonicalCorrelation | None = None
    ) -> None:
        """Write the files of a folder that has no features yet.

        ``folder.json`` is the first of its files: a folder that has others alone is not of this command.

        Args:
            output: The folder, which is there.
            about: The entries of ``folder.json`` about the teacher, the data and the settings.
            pairs: The hash of each row's pair.
            alignment: The projections of an aligned folder.
        """
        _delete_marks(output)  # of an earlier folder here, which was of other pairs
        about = {**about, "rows": len(pairs), "complete": False, "files": {PAIRS: hash_of(pairs).hex()}}
        if alignment is None:
            write_about(output, about)
        else:
            from safetensors.torch import save

            projections = save(alignment.tensors())
            about["files"][ALIGNMENT] = hash_of(projections).hex()
            about["alignment"] = alignment.setting.as_options()
            write_about(output, about)
            write_bytes(output / ALIGNMENT, projections)
        write_array(output / PAIRS, pairs)

    def empty_shard(self, shard: int) -> dict[str, Array]:
        """Arrays of zeros, for the files of a shard."""
        forms = {name: self.form_of(name, shard) for name in self.files_of(shard)}
        return {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms.items()}

    def save(self, shard: int, arrays: dict[str, Array]) -> None:
        """Write the files of a shard, and once they are on the disk their hashes, its mark.

        Args:
            shard: Its number.
            arrays: The content of its files, by the names of :meth:`files_of`.
        """
        files = self.files_of(shard)
        hashes = {files[name].name: write_array(files[name], array) for name, array in arrays.items()}
        with replacing(self._mark_of(shard)) as file:
            file.write(json.dumps(hashes).encode())

    def is_whole(self, shard: int) -> bool:
        """True if the shard's files are there, and as they were written.

        Raises:
            ValueError: The mark is damaged.
        """
        try:
            arrays = self.read_shard(shard)
        except ValueError:  # a file is missing, or of another size
            return False
        files = self.files_of(shard)
        hashes = {files[name].name: hash_of(array).hex() for name, array in arrays.items()}
        return hashes == self._hashes_of(shard)

    def finish(self) -> None:
        """Write that the folder is complete, once its shards are, and delete their marks and drafts.

        Raises:
            ValueError: No row has features, all rows of a modality are one, or a file is missing or damaged.
        """
        hashes = self.about["files"]
        files = {name: hashes[name] for name in (PAIRS, ALIGNMENT) if name in hashes}
        for shard in self.shards:
            files |= self._hashes_of(shard)
        skipped = self._number_of_skipped_rows()
        if skipped == len(self):
            raise ValueError(f"none of {skipped} pictures can be read")
        for name in self.about["widths"]:
            check_rows_differ(
                f"the teacher's {name}", (self.read_shard(shard)[name] for shard in self.shards)
            )
        write_about(Path(self.path), {**self.about, "files": files, "complete": True, "skipped": skipped})
        _delete_marks(Path(self.path))
        self._delete_drafts()

    def _number_of_skipped_rows(self) -> int:
        """How many rows have no features, since their pictures could not be read."""
        skipped = 0
        for shard in self.shards:
            first_modality = next(iter(self.read_shard(shard).values()))  # a skipped row is zero in both
            has_features = first_modality.any(axis=1)
            skipped += int((~has_features).sum())
        return skipped

    def _delete_drafts(self) -> None:
        """Delete the drafts of the shards' files, which a killed repair of a shard leaves.

        It had rewritten the damaged file, and was rewriting another one, which was whole. Now the shard is
        whole, and not written again.
        """
        for shard in self.shards:
            for file in self.files_of(shard).values():
                draft_path(file).unlink(missing_ok=True)

    def _mark_of(self, shard: int) -> Path:
        """The file with the hashes of a shard's files, which is there once they are on the disk."""
        return Path(self.path, f"shard-{shard:05}.json")

    def _hashes_of(self, shard: int) -> dict[str, Any]:
        """The hashes of a shard's files as they were written, by the files' names; None for one unknown.

        They stand in the shard's mark, or without one in ``folder.json`` of a folder that is complete.

        Raises:
            ValueError: The mark is damaged.
        """
        mark = self._mark_of(shard)
        if not os.path.lexists(mark):
            return {file.name: self.about["files"].get(file.name) for file in self.files_of(shard).values()}
        hashes = read_json(mark)
        if not _are_hashes(hashes):
            raise ValueError(f"{mark} is damaged: it must be a hash for each file; got {hashes!r}")
        return dict(hashes)


def _delete_marks(folder: Path) -> None:
    """Delete the marks of all shards."""
    for mark in folder.glob("*shard-*.json"):  # and their drafts
        mark.unlink()
