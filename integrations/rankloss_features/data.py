"""The pairs of a training, read as its trainer reads them: tables of pairs and shards of a webdataset."""

from __future__ import annotations

import argparse
import bisect
import functools
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from rankloss.checks import check_id
from rankloss_features import opening
from rankloss_features.csv_cells import check_cells
from rankloss_features.errors import flag
from rankloss_features.folder import (
    PairBlock,
    common_folder,
    hash_of,
    hash_of_pair,
    identity_of,
    name_of,
    possible_names,
)
from rankloss_features.pictures import Rendering

_BLOCK = 512  # pairs that are hashed together, and the pictures of those without a name
_LOOKED_AT = 64  # pictures or shards, at most, that are read to tell data apart
_BEGINNING = 2**20  # bytes that are read of each of them
_Item = TypeVar("_Item")
IMAGES = ("jpg", "png", "jpeg", "webp")  # the extensions of images in open_clip's trainer, by preference


def named_sample(sample: Mapping[str, Any]) -> str:
    """The noun for a webdataset sample in messages."""
    return f"sample {sample.get('__key__')!r} of {sample.get('__url__')}"


def extensions(keys: str) -> list[str]:
    """The extensions, the preferred first, that an option like ``--text-key`` names: separated by ``;``.

    ``json:FIELD``, which the option may name as well, is one of them.

    Example:
        >>> extensions("txt; caption; json:title")
        ['txt', 'caption', 'json:title']
    """
    parts = (part.strip() for part in keys.split(";"))
    return [part for part in parts if part]


def read_member(sample: Mapping[str, Any], key: str) -> Any:
    """A member of a webdataset sample by its extension, or with ``json:FIELD`` a field of its JSON.

    None if the sample has none.
    """
    extension, _, field = key.partition(":")
    if extension != "json":
        return sample.get(key.lower())  # webdataset's extensions are in lower case
    try:
        return json.loads(sample["json"])[field]
    except (KeyError, TypeError, ValueError):  # no member, no JSON, no object, or an object without the field
        return None


def read_id(sample: Mapping[str, Any], key: str) -> Any:
    r"""The id of a webdataset sample, as a text without the whitespace around it; None without one.

    A file with ``7`` and the end of a line, and in JSON the text ``"7"`` and the number ``7``, are one id.
    Other values of JSON, which are no ids, stay what they are.

    Example:
        >>> read_id({"id": b"7\n"}, "id"), read_id({"json": b'{"id": 7}'}, "json:id")
        ('7', '7')
    """
    value = read_member(sample, key)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return str(value).strip() if is_integer or isinstance(value, str) else value


class Sample(NamedTuple):
    """A pair, whose picture is opened when it is needed.

    Attributes:
        row: Its row.
        name: Its picture's name.
        caption: Its caption.
        open: A function that opens its picture; None before the picture's bytes are read.
        source: Its picture's path or bytes; once these are read, its identity. Equal values mean one picture.
    """

    row: int
    name: str
    caption: str
    open: Any = None
    source: Any = None


Spans = Sequence[tuple[int, int]]
"""The batches of a shard: the first row of each, and the row after its last, counted over all shards."""


def groups_of(data: Any, size: int, ranges: Iterable[range]) -> list[tuple[int, Spans]]:
    """Divide ranges of rows into batches, and group those that one reader has to read.

    No batch has rows of two shards.

    Args:
        data: The data, once their pairs were counted.
        size: The rows of a batch, at most.
        ranges: The rows.

    Returns:
        The shard and the batches of each group: all batches of a shard that is read as a stream, else one.
    """
    ends = list(itertools.accumulate(data.counts))  # of each shard, the row after its last
    spans_of_shard: dict[int, list[tuple[int, int]]] = {}
    for rows in ranges:
        first = rows.start
        while first < rows.stop:
            shard = bisect.bisect_right(ends, first)
            end = min(first + size, ends[shard], rows.stop)
            spans_of_shard.setdefault(shard, []).append((first, end))
            first = end
    if data.is_stream:
        return list(spans_of_shard.items())
    return [(shard, [span]) for shard, spans in spans_of_shard.items() for span in spans]


class Table:
    """A ``datasets.Dataset``.

    Args:
        dataset: The dataset.
        image_column: Its images, or their paths.
        caption_column: Its captions.
        id_column: The ids of pairs that belong together, or None.
        rendering: The way to its pictures.
        **about: The entries of ``folder.json`` about it.

    Attributes:
        counts: The pairs of each shard; a table is one shard.
        ids: The values of the column of ids, None without one.
        is_stream: True if a shard can be read from its start alone, and pictures that cannot be read are
            skipped, as its trainer skips them.

    Raises:
        ValueError: It has no such column, or one of another kind, or an id is neither a text nor an integer.
    """

    is_stream = False

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        caption_column: str,
        id_column: str | None = None,
        rendering: Rendering = Rendering(),  # noqa: B008 (it is frozen)
        **about: Any,
    ) -> None:
        import datasets

        self.rendering = rendering
        self.about = about
        self.counts = [len(dataset)]
        self.caption_column = caption_column
        dataset = dataset.with_format(None)
        self.ids = None if id_column is None else _checked_ids(dataset, id_column)
        dataset = dataset.select_columns([image_column, caption_column])
        dataset = dataset.rename_columns({image_column: "image", caption_column: "caption"})
        try:
            # Columns caption, image.path and image.bytes; one of the latter two may be None in a row.
            self.dataset = dataset.cast_column("image", datasets.Image(decode=False)).flatten()
        except Exception as error:  # Arrow raises many
            raise ValueError(f"column {image_column!r} must hold images or their paths: {error}") from error
        self.names = self.dataset.select_columns(["image.path", "caption"])
        self.contents = self.dataset.select_columns(["image.bytes"])

    def pairs(self) -> Iterator[PairBlock]:
        """All pairs, in the order of the rows. It is called before all else, since it may count them."""
        for first in range(0, len(self.names), _BLOCK):
            captions, names = self._read_captions_and_names(first, self.names[first : first + _BLOCK])
            yield PairBlock(captions, names, names)

    def pictures(self, rows: Iterable[int]) -> Iterator[tuple[int, str, bytes]]:
        """The row, name and content of each row's picture, if it is stored or its file is here."""
        for block in _blocks(rows):
            pictures = self.dataset[block]
            paths, contents = pictures["image.path"], pictures["image.bytes"]
            for row, path, content in zip(block, paths, contents, strict=True):
                is_a_file = bool(path) and os.path.isfile(path)
                if content or is_a_file:
                    name = name_of(path or content, self._folder)
                    yield row, name, content or opening.content_of(path)

    def _read_captions_and_names(
        self, first: int, block: dict[str, list[Any]]
    ) -> tuple[list[str], list[str]]:
        """The caption of each row of a block, and the name of its picture.

        Args:
            first: The first row of the block, for the error and for the pictures' content.
            block: The columns ``caption`` and ``image.path`` of the rows.

        Raises:
            ValueError: A row has no caption.
        """
        for row, caption in enumerate(block["caption"], first):
            if not (caption and isinstance(caption, str)):
                raise ValueError(f"row {row} has no caption in column {self.caption_column!r}: {caption!r}")
        pictures = self._pictures(first, block["image.path"])
        return block["caption"], [name_of(picture, self._folder) for picture in pictures]

    def _pictures(self, first: int, paths: list[str | None]) -> list[Any]:
        """The path of each row's picture, or its stored bytes where the path does not tell it from others.

        Args:
            first: The row of the first path.
            paths: The paths of the pictures, row by row.
        """
        if self._shared_paths.isdisjoint(paths):
            return list(paths)
        contents = self.contents[first : first + len(paths)]["image.bytes"]
        return [
            content if path in self._shared_paths and content else path
            for path, content in zip(paths, contents, strict=True)
        ]

    @functools.cached_property
    def _all_paths(self) -> Any:
        """The paths as an array of Arrow, of which no objects are made."""
        return self.names.with_format("arrow")[:]["image.path"]

    @functools.cached_property
    def _folder(self) -> str:
        """The folder of all pictures."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]  # which datasets brings

        first_and_last = pc.min_max(self._all_paths).as_py()  # in the alphabet; all others lie between them
        return common_folder([path for path in first_and_last.values() if path])

    @functools.cached_property
    def _shared_paths(self) -> set[str | None]:
        """The paths that do not tell a picture from others: none, and those of several stored pictures."""
        shared: set[str | None] = {None, ""}
        stored = self.contents.data.column("image.bytes")
        if stored.null_count == len(stored):  # all pictures are files, one for each path
            return shared
        first_hashes: dict[str, bytes] = {}
        rows = self._rows_of_repeated_paths()
        for first in range(0, len(rows), _BLOCK):
            block = rows[first : first + _BLOCK].to_pylist()
            paths = self.names[block]["image.path"]
            contents = self.contents[block]["image.bytes"]
            for path, content in zip(paths, contents, strict=True):
                if content and path not in shared:
                    digest = hash_of(content)
                    if first_hashes.setdefault(path, digest) != digest:
                        shared.add(path)
        return shared

    def _rows_of_repeated_paths(self) -> Any:
        """The rows whose path stands in another row, too, as an array of Arrow."""
        import pyarrow.compute as pc

        paths = self._all_paths
        counts = pc.value_counts(paths)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        is_repeated = pc.and_(pc.is_valid(paths), pc.is_in(paths, repeated))
        return pc.indices_nonzero(is_repeated)

    def identity(self) -> str:
        """A hash that differs for other data: of captions, paths, and the pictures of some rows."""
        digest = hashlib.blake2b(repr(self.rendering).encode(), digest_size=16)
        for first in range(0, len(self.names), _BLOCK):
            block = self.names[first : first + _BLOCK]
            paths = block["image.path"]  # None, or empty, of pictures without a file
            absolute_paths = [path and os.path.abspath(path) for path in paths]
            described = repr((self._read_captions_and_names(first, block), absolute_paths))
            digest.update(described.encode("utf-8", "surrogatepass"))
        for row in some_rows(len(self.dataset)):
            picture = self.dataset[row]
            digest.update(picture["image.bytes"] or _beginning(picture["image.path"] or ""))
        return digest.hexdigest()

    def sources(self) -> list[str]:
        """The source of each row's picture, by which equal pictures are known.

        It is the picture's path, or a hash of its bytes where it has no path or another picture has the same.
        """
        sources: list[str] = []
        for first in range(0, len(self.names), _BLOCK):
            paths = self.names[first : first + _BLOCK]["image.path"]
            pictures = self._pictures(first, paths)
            sources += [picture if isinstance(picture, str) else name_of(picture) for picture in pictures]
        return sources

    def read(self, shard: int, spans: Spans) -> Iterator[list[Sample]]:  # noqa: ARG002 (a table is one shard)
        """The samples of some batches of a shard, in the order of its rows, as a list for each batch."""
        for first, end in spans:
            block = self.dataset[first:end]
            captions, names = self._read_captions_and_names(first, block)
            contents_and_paths = zip(block["image.bytes"], block["image.path"], strict=True)
            sources = [content or path for content, path in contents_and_paths]
            rows = range(first, end)
            yield [
                Sample(row, name, caption, source=source)
                for row, name, caption, source in zip(rows, names, captions, sources, strict=True)
            ]


def _blocks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """The items in lists of :data:`_BLOCK`, of which the last may be shorter."""
    iterator = iter(items)
    while block := list(itertools.islice(iterator, _BLOCK)):
        yield block


def _checked_ids(dataset: Any, column: str) -> list[Any]:
    """The ids of a column.

    Raises:
        ValueError: There is no such column, or an id is neither a text nor an integer.
    """
    if column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r} of ids, but {dataset.column_names}")
    ids = list(dataset[column])
    for row, value in enumerate(ids):
        check_id(f"ids in column {column}", value, row)
    return ids


def is_first_pair(pair: int, dataset: Any, image_column: str, caption_column: str) -> bool:
    """True if a hash is that of a dataset's first pair.

    The name of its image depends on the folder of all images, which one pair does not tell: each possible
    name is tried.

    Args:
        pair: The hash of a pair, as a folder of features has it.
        dataset: The dataset.
        image_column: Its images.
        caption_column: Its captions.

    Raises:
        ValueError: As :class:`Table`: the columns hold no images or no captions.
    """
    table = Table(dataset.select([0]), image_column, caption_column)
    row = table.dataset[0]
    captions = next(table.pairs()).captions
    path, content = row["image.path"], row["image.bytes"]
    names = possible_names(path) if path else []
    if content:
        names.append(name_of(content))
    return any(hash_of_pair(captions[0], name) == pair for name in names)


class _ShardSample(NamedTuple):
    """A sample of a webdataset.

    Attributes:
        caption: Its caption.
        key: Its key, the name of its files without their extensions.
        picture: The content of its picture, or the identity of that.
        id: Its id; None without ids.
    """

    caption: str
    key: str
    picture: Any
    id: Any


class Shards:
    """A webdataset, whose shards are read as a stream. Its members are those of :class:`Table`.

    Args:
        urls: As ``--train-data`` has them.
        text_key: The extension of a caption; several, by preference, are separated by ``;``.
        rendering: The way to its pictures.
        id_key: The ids of pairs that belong together, as :func:`read_id` reads them, or None.
    """

    is_stream = True

    def __init__(
        self,
        urls: str,
        text_key: str = "txt",
        rendering: Rendering = Rendering(upright=False),  # noqa: B008 (it is frozen)
        id_key: str | None = None,
    ) -> None:
        import webdataset

        self.rendering, self.id_key = rendering, id_key
        self.ids: list[Any] | None = None
        listed: list[str] = []
        for part in urls.split("::"):
            listed += webdataset.shardlists.expand_urls(part)
        # A shard that is listed twice, to be seen more often, has the same pairs.
        self.urls = list(dict.fromkeys(listed))
        self.text_keys = extensions(text_key)
        self.about = {"kind": "webdataset", "data": urls}
        self.counts: list[int] = []

    def sources(self) -> list[str]:
        """See :class:`Table`: the number of each sample, whose picture is not known before it is read."""
        return [str(row) for row in range(sum(self.counts))]

    def identity(self) -> str:
        """See :class:`Table`: of the shards' paths and sizes, and the beginning of some."""
        places = [os.path.abspath(url) for url in self.urls]
        sizes = [os.path.getsize(url) if os.path.isfile(url) else None for url in self.urls]
        digest = hashlib.blake2b(repr((places, sizes, self.text_keys, self.rendering)).encode())
        for i in some_rows(len(self.urls)):
            digest.update(_beginning(self.urls[i]))
        return digest.hexdigest()

    def _samples(self, url: str) -> Iterator[_ShardSample]:
        """The samples of a shard that have a caption and a picture. Members that are not needed are not read.

        Raises:
            ValueError: The shard cannot be read, or a sample lacks an id.
        """
        from webdataset.gopen import gopen
        from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

        needed_extensions = {*self.text_keys, *IMAGES}
        if self.id_key is not None:
            id_extension, _, _ = self.id_key.partition(":")
            needed_extensions.add(id_extension.lower())

        def is_needed(file: str) -> bool:
            _, extension = base_plus_ext(file)
            return (extension or "").lower() in needed_extensions

        try:
            with gopen(url) as stream:
                files = tar_file_iterator(stream, select_files=is_needed)
                for members in group_by_keys({**file, "__url__": url} for file in files):
                    text = _preferred_member(members, self.text_keys)
                    picture = _preferred_member(members, IMAGES)
                    if text is not None and picture is not None:
                        caption = text.decode(errors="replace")
                        yield _ShardSample(caption, members["__key__"], picture, self._id_of(members))
        except tarfile.TarError as error:
            raise ValueError(f"{url} cannot be read: {error}") from error

    def _identified_samples(self, url: str) -> Iterator[_ShardSample]:
        """The samples of a shard, with the identities of their pictures in place of these, to save memory."""
        for sample in self._samples(url):
            yield sample._replace(picture=identity_of(sample.picture))

    def _id_of(self, sample: Mapping[str, Any]) -> Any:
        """The id of a sample; None without ids.

        Raises:
            ValueError: The sample lacks it, or it is neither a text nor an integer.
        """
        if self.id_key is None:
            return None
        value = read_id(sample, self.id_key)
        try:
            check_id(self.id_key, value, 0)
        except ValueError as error:
            raise ValueError(
                f"--ids-key {self.id_key}: {named_sample(sample)} has no text or integer there, but {value!r}"
            ) from error
        return value

    def pairs(self) -> Iterator[PairBlock]:
        """See :class:`Table`."""
        self.counts = []
        self.ids = None if self.id_key is None else []
        for url in self.urls:
            self.counts.append(0)
            for block in _blocks(self._identified_samples(url)):
                self.counts[-1] += len(block)
                if self.ids is not None:
                    self.ids += [sample.id for sample in block]
                yield PairBlock(
                    captions=[sample.caption for sample in block],
                    names=[sample.key for sample in block],
                    pictures=[sample.picture for sample in block],
                )

    def pictures(self, rows: Iterable[int]) -> Iterator[tuple[int, str, bytes]]:  # noqa: ARG002
        """See :class:`Table`: none, since :meth:`pairs` has the content of all."""
        yield from ()

    def read(self, shard: int, spans: Spans) -> Iterator[list[Sample]]:
        """See :class:`Table`. Samples before and between the batches are skipped."""
        samples = self._samples(self.urls[shard])
        next_row = sum(self.counts[:shard])  # of the stream's next sample
        for first, end in spans:
            batch = itertools.islice(samples, first - next_row, end - next_row)
            next_row = end
            yield [
                Sample(row, sample.key, sample.caption, source=sample.picture)
                for row, sample in enumerate(batch, start=first)
            ]


def _preferred_member(sample: Mapping[str, Any], preferred: Iterable[str]) -> Any:
    """A sample's member with the first of some extensions that it has; None if it has none of them."""
    for extension in preferred:
        if extension in sample:
            return sample[extension]
    return None


Data: TypeAlias = Table | Shards


def some_rows(count: int) -> list[int]:
    """Up to :data:`_LOOKED_AT` of so many rows, equally far apart, the first and the last among them."""
    if count == 0:
        return []
    return sorted({i * (count - 1) // (_LOOKED_AT - 1) for i in range(_LOOKED_AT)})


def _beginning(path: str) -> bytes:
    """The first bytes of a file; none without a local file."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(_BEGINNING)


def _csv(path: str, separator: str, keys: dict[str, str], ids_key: str | None) -> Any:
    """A ``datasets.Dataset`` of a CSV file, read as open_clip's trainer reads it: pandas makes 7 of 007.

    Ids are as the file has them. A cell that pandas takes for a missing value, such as ``NA``, is refused.

    Args:
        path: The file.
        separator: Between its columns.
        keys: The columns of pictures and captions by the options that name them.
        ids_key: The column of ids, or None.

    Raises:
        ValueError: The file cannot be read or lacks a column, a cell has no value, or an id is neither a text
            nor an integer.
    """
    import datasets
    import pandas  # type: ignore[import-untyped]

    try:
        table = pandas.read_csv(path, sep=separator)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error} (--csv-separator {separator!r})") from error
    check_cells(table, path, separator)
    for option, key in keys.items():
        _check_column(table, path, separator, option, key)
    columns = {key: [str(cell) for cell in table[key].tolist()] for key in keys.values()}
    if ids_key is not None:
        _check_column(table, path, separator, "--ids-key", ids_key)
        ids = ids_as_written(path, separator, ids_key, table[ids_key])
        for row, value in enumerate(ids):
            check_id(f"ids in column {ids_key}", value, row)
        columns.setdefault(ids_key, ids)  # unless the column is that of the pictures or captions
    return datasets.Dataset.from_dict(columns)


def _check_column(table: Any, path: str, separator: str, option: str, key: str) -> None:
    """Raise a ValueError for a column that a CSV file lacks, or a cell of it that has no value.

    Args:
        table: The file as pandas has it.
        path: The file.
        separator: Between its columns.
        option: The option that names the column.
        key: The column.
    """
    import pandas

    names = list(table.columns)
    is_part_of_a_name = any(key in str(name) for name in names)
    hint = "; wrong --csv-separator?" if is_part_of_a_name else ""
    _check_has_column(names, path, option, key, hint)
    is_missing = table[key].isna()
    if is_missing.any():
        row = int(is_missing.argmax())
        as_written = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
        cell = as_written[key].iloc[row]
        raise ValueError(f"row {row} of {path}, column {key!r}: {cell!r} is a missing value to open_clip")


def _check_has_column(names: list[str], path: str, option: str, column: str, hint: str = "") -> None:
    """Raise a ValueError, which ends with the hint, for a column that is none of these names."""
    if column not in names:
        raise ValueError(f"{option} {column}: {path} has the columns {names}{hint}")


def ids_as_written(path: str, separator: str, key: str, parsed: Any) -> list[Any]:
    """The ids of a CSV file's rows as it has them: 007 and 7, of which pandas makes one integer, are two.

    Args:
        path: The file.
        separator: Between its columns.
        key: The column of ids.
        parsed: The column as pandas has it. Floats and booleans, which are no ids, stay what they are.
    """
    import pandas

    values: list[Any] = parsed.tolist()
    if any(isinstance(value, int) and not isinstance(value, bool) for value in values):
        as_written = pandas.read_csv(path, sep=separator, usecols=[key], dtype=str)
        values = as_written[key].tolist()
    return values


class Option(NamedTuple):
    """An option of one kind of data.

    Attributes:
        default: Its value where it is not given.
        metavar: The placeholder of its value in the help.
        help: Its meaning.
    """

    default: str
    metavar: str
    help: str


OPTIONS = {
    "csv": {
        "csv_separator": Option("\t", "TEXT", "of a CSV file"),
        "csv_img_key": Option("filepath", "KEY", "column of the image paths in a CSV file"),
        "csv_caption_key": Option("title", "KEY", "column of the captions in a CSV file"),
    },
    "webdataset": {"text_key": Option("txt", "KEY", "caption's extension in a webdataset")},
    "datasets": {
        "image_column": Option("image", "NAME", "of a folder of datasets"),
        "caption_column": Option("caption", "NAME", "of a folder of datasets"),
        "split": Option("train", "NAME", "of a folder of datasets"),
    },
}
"""The options of each kind of data, by their names in the parsed arguments."""

_NOUNS = {"csv": "a CSV file", "webdataset": "a webdataset", "datasets": "a folder of datasets"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command line that name data, which :func:`open_data` reads."""
    read = parser.add_argument_group("the data, as the trainer has them")
    read.add_argument("--data", help="a CSV file, shards, or a folder of datasets")
    read.add_argument(
        "--dataset-type", default="auto", choices=("auto", *OPTIONS), help="auto goes by the name"
    )
    for options in OPTIONS.values():
        for name, (default, metavar, text) in options.items():
            shown = f"{text} (default: {default})".replace("\t", "\\t")
            # Without a default in the arguments, those that a user gave are known.
            read.add_argument(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=shown)
    read.add_argument("--background", metavar="COLOUR", help="behind transparent pictures (white)")


def kind_of(path: str, dataset_type: str, option: str = "--data") -> str:
    """The kind of data, a key of :data:`OPTIONS`, by ``--dataset-type`` or by the name.

    Raises:
        ValueError: The name is of no known kind.
    """
    if dataset_type != "auto":
        return dataset_type
    if os.path.isdir(path):
        return "datasets"
    kinds = {"csv": "csv", "tsv": "csv", "tar": "webdataset"}
    _, _, extension = path.lower().rpartition(".")
    if extension not in kinds:
        raise ValueError(f"{option} {path} is no folder, .csv, .tsv or .tar: give --dataset-type")
    return kinds[extension]


def open_data(args: Any, path: str | None = None) -> Data:
    """The data that a command line names.

    Args:
        args: The parsed arguments, where the options of :data:`OPTIONS` are absent, or None, if not given.
        path: That of ``--val-data``; by default that of ``--data``.

    Raises:
        ValueError: There are none, they are of no known kind, an option is of another kind than all that the
            command line names, or they cannot be read, or lack a column or captions.
    """
    if args.data is None:
        raise ValueError("--data is needed: the pairs, as the trainer has them")
    _check_options(args)
    path = str(args.data if path is None else path)
    kind = kind_of(path, args.dataset_type)
    given = {name: getattr(args, name, None) for name in OPTIONS[kind]}
    options: dict[str, Any] = {
        name: option.default if given[name] is None else given[name] for name, option in OPTIONS[kind].items()
    }
    ids_key = getattr(args, "ids_key", None)
    # open_clip's readers of CSV files and shards leave the camera's orientation as it is; datasets turns it.
    rendering = rendering_of(getattr(args, "background", None), upright=kind == "datasets")
    if kind == "webdataset":
        return Shards(path, options["text_key"], rendering, ids_key)
    import datasets

    datasets.disable_progress_bars()
    if kind == "csv":
        image_column, caption_column = options["csv_img_key"], options["csv_caption_key"]
        keys = {"--csv-img-key": image_column, "--csv-caption-key": caption_column}
        dataset = _csv(path, options["csv_separator"], keys, ids_key)
    else:
        image_column, caption_column = options["image_column"], options["caption_column"]
        dataset = _split(path, given["split"])
        _check_has_column(dataset.column_names, path, "--image-column", image_column)
        _check_has_column(dataset.column_names, path, "--caption-column", caption_column)
    return Table(dataset, image_column, caption_column, ids_key, rendering, kind=kind, data=path)


def _split(path: str, name: str | None) -> Any:
    """The data of a folder of datasets: the split of a name, ``train`` without one, or the only table.

    Raises:
        ValueError: The folder has no such split, or a name is given and the folder has no splits.
    """
    import datasets

    dataset = opening.dataset(path)
    if isinstance(dataset, datasets.DatasetDict):
        split = OPTIONS["datasets"]["split"].default if name is None else name
        if split not in dataset:
            raise ValueError(f"--split {split}: {path} has {', '.join(dataset)}")
        return dataset[split]
    if name is not None:
        raise ValueError(f"--split {name}: {path} is a single table, without splits")
    return dataset


def _check_options(args: Any) -> None:
    """Raise a ValueError for an option that is of none of the kinds of data that are given."""
    paths = {"--data": args.data, "--val-data": getattr(args, "val_data", None)}
    given_paths = {option: str(path) for option, path in paths.items() if path is not None}
    kinds = {option: kind_of(path, args.dataset_type, option) for option, path in given_paths.items()}
    for kind, options in OPTIONS.items():
        if kind in kinds.values():
            continue
        for name in options:
            value = getattr(args, name, None)
            if value is not None:
                given = [
                    f"{option} {path} is {_NOUNS[kinds[option]]}" for option, path in given_paths.items()
                ]
                raise ValueError(
                    f"{flag(name)} {value!r} is an option of {_NOUNS[kind]}: {', and '.join(given)}"
                )


def rendering_of(background: str | None, *, upright: bool) -> Rendering:
    """The rendering with the colour of ``--background``, if one is given.

    Raises:
        ValueError: It is no colour.
    """
    try:
        return Rendering(upright) if background is None else Rendering(upright, background)
    except ValueError as error:  # its first word is the option's name, background
        raise ValueError(f"--{error}") from error
