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
from typing import Any, NamedTuple, TypeAlias

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
_LOOKED_AT = 64  # pictures or shards that are read to tell data apart
IMAGES = ("jpg", "png", "jpeg", "webp")  # the extensions of images in open_clip's trainer, by preference


def named_sample(sample: Mapping[str, Any]) -> str:
    """The noun for a webdataset sample in messages."""
    return f"sample {sample.get('__key__')!r} of {sample.get('__url__')}"


def extensions(keys: str) -> list[str]:
    """The extensions, the preferred first, that an option like ``--text-key`` names: separated by ``;``.

    Example:
        >>> extensions("txt; caption")
        ['txt', 'caption']
    """
    return [key for part in keys.split(";") if (key := part.strip())]


def read_member(sample: Mapping[str, Any], key: str) -> Any:
    """A member of a webdataset sample by its extension, or with ``json:FIELD`` a field of its JSON.

    None if the sample has none.
    """
    kind, _, field = key.partition(":")
    try:
        return json.loads(sample["json"])[field] if kind == "json" else sample[key.lower()]
    except (KeyError, TypeError, ValueError):
        return None


class Sample(NamedTuple):
    """A pair, whose picture is opened when it is needed.

    Attributes:
        row: Its row.
        name: Its picture's name.
        caption: Its caption.
        open: Opens its picture, once it is read.
        source: Its picture's path or bytes, and once it is read its identity; equal values mean one picture.
    """

    row: int
    name: str
    caption: str
    open: Any = None
    source: Any = None


Spans = Sequence[tuple[int, int]]
"""First and last row, the latter excluded, of each batch."""


def groups_of(data: Any, size: int, left: Iterable[range]) -> list[tuple[int, Spans]]:
    """Ranges of rows in batches, grouped by the source that has to be read from its start."""
    ends = list(itertools.accumulate(data.counts))
    groups: dict[int, list[tuple[int, int]]] = {}
    for rows in left:
        first = rows.start
        while first < rows.stop:
            source = bisect.bisect_right(ends, first)
            last = min(first + size, ends[source], rows.stop)
            groups.setdefault(source, []).append((first, last))
            first = last
    if data.is_stream:
        return list(groups.items())
    return [(source, [span]) for source, spans in groups.items() for span in spans]


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
        counts: The pairs of each source, here one.
        ids: The values of the column of ids, None without one.
        is_stream: True if a source is read from its start, by a trainer that knows samples by name, and skips
            pictures that cannot be read.

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
        self.about, self.counts, self.caption_column = about, [len(dataset)], caption_column
        self.ids: list[Any] | None = None
        if id_column is not None:
            if id_column not in dataset.column_names:
                raise ValueError(f"there is no column {id_column!r} of ids, but {dataset.column_names}")
            self.ids = list(dataset.with_format(None)[id_column])
            for row, value in enumerate(self.ids):
                check_id(f"ids in column {id_column}", value, row)
        dataset = dataset.with_format(None).select_columns([image_column, caption_column])
        dataset = dataset.rename_columns({image_column: "image", caption_column: "caption"})
        try:
            self.dataset = dataset.cast_column("image", datasets.Image(decode=False)).flatten()
        except Exception as error:  # Arrow raises many
            raise ValueError(f"column {image_column!r} must hold images or their paths: {error}") from error
        self.names = self.dataset.select_columns(["image.path", "caption"])
        self.contents = self.dataset.select_columns(["image.bytes"])

    def pairs(self) -> Iterator[PairBlock]:
        """All pairs, in the order of the rows. It is called first, and counts them."""
        for first in range(0, len(self.names), _BLOCK):
            captions, names = self._named(first, self.names[first : first + _BLOCK])
            yield PairBlock(captions, names, names)

    def pictures(self, rows: Iterable[int]) -> Iterator[tuple[int, str, bytes]]:
        """The row, the name and the content of the pictures of some rows, but of those that are not there."""
        left = iter(rows)
        while block := list(itertools.islice(left, _BLOCK)):
            pictures = self.dataset[block]
            for row, path, content in zip(
                block, pictures["image.path"], pictures["image.bytes"], strict=True
            ):
                if content or (path and os.path.isfile(path)):
                    yield row, name_of(path or content, self._folder), content or opening.content_of(path)

    def _named(self, first: int, block: dict[str, list[Any]]) -> tuple[list[str], list[str]]:
        for row, caption in enumerate(block["caption"], first):
            if not (caption and isinstance(caption, str)):
                raise ValueError(f"row {row} has no caption in column {self.caption_column!r}: {caption!r}")
        pictures = self._pictures(first, block["image.path"])
        return block["caption"], [name_of(picture, self._folder) for picture in pictures]

    def _pictures(self, first: int, paths: list[str | None]) -> list[Any]:
        """The path of each row's picture, or the bytes of one whose path others share."""
        if self._shared_paths.isdisjoint(paths):
            return [*paths]
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

        ends = pc.min_max(self._all_paths).as_py()
        return common_folder([end for end in ends.values() if end])

    @functools.cached_property
    def _shared_paths(self) -> set[str | None]:
        """The paths, None among them, that several pictures inside the data share."""
        import pyarrow.compute as pc

        content = self.contents.data.column("image.bytes")
        if content.null_count == len(content):
            return {None}
        paths = self._all_paths
        counts = pc.value_counts(paths)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        rows = pc.indices_nonzero(pc.and_(pc.is_valid(paths), pc.is_in(paths, repeated)))
        shared: set[str | None] = {None}
        first_contents: dict[str, bytes] = {}
        for first in range(0, len(rows), _BLOCK):
            block = rows[first : first + _BLOCK]
            contents = self.contents[block.to_pylist()]["image.bytes"]
            for path, content in zip(paths.take(block).to_pylist(), contents, strict=True):
                if content and path not in shared:
                    digest = hash_of(content)
                    if first_contents.setdefault(path, digest) != digest:
                        shared.add(path)
        return shared

    def identity(self) -> str:
        """A hash that differs for other data: of captions, paths, and the pictures of some rows."""
        digest = hashlib.blake2b(repr(self.rendering).encode(), digest_size=16)
        for first in range(0, len(self.names), _BLOCK):
            block = self.names[first : first + _BLOCK]
            described = repr(
                (self._named(first, block), [path and os.path.abspath(path) for path in block["image.path"]])
            )
            digest.update(described.encode("utf-8", "surrogatepass"))
        for row in some_rows(len(self.dataset)):
            picture = self.dataset[row]
            digest.update(picture["image.bytes"] or _beginning(picture["image.path"]))
        return digest.hexdigest()

    def sources(self) -> list[str]:
        """The picture of each row: its path, or a hash of its bytes if others share the path, as None."""
        sources: list[str] = []
        for first in range(0, len(self.names), _BLOCK):
            paths = self.names[first : first + _BLOCK]["image.path"]
            pictures = self._pictures(first, paths)
            sources += [picture if isinstance(picture, str) else name_of(picture) for picture in pictures]
        return sources

    def read(self, source: int, spans: Spans) -> Iterator[list[Sample]]:  # noqa: ARG002
        """The samples of some batches of a source."""
        for first, last in spans:
            block = self.dataset[first:last]
            captions, names = self._named(first, block)
            contents, paths = block["image.bytes"], block["image.path"]
            samples = []
            for row, caption, name, content, path in zip(
                range(first, last), captions, names, contents, paths, strict=True
            ):
                samples.append(Sample(row, name, caption, source=content or path))
            yield samples


def is_first_pair(pair: int, dataset: Any, image_column: str, caption_column: str) -> bool:
    """True if a hash is that of a dataset's first pair, whose image may have any of its possible names.

    Raises:
        ValueError: As :class:`Table`: the columns hold no images or no captions.
    """
    table = Table(dataset.select([0]), image_column, caption_column)
    row = table.dataset[0]
    captions = next(table.pairs()).captions
    path, content = row["image.path"], row["image.bytes"]
    names = possible_names(path) if path else []
    names += [name_of(content)] if content else []
    return any(hash_of_pair(captions[0], name) == pair for name in names)


class Shards:
    """A webdataset, whose shards are read as a stream. Its members are those of :class:`Table`.

    Args:
        urls: As ``--train-data`` has them.
        text_key: The extension of a caption; several, by preference, are separated by ``;``.
        rendering: The way to its pictures.
        id_key: The ids of pairs that belong together, as :func:`read_member` reads them, or None.
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
        # A shard that is listed twice, to be seen more often, has the same pairs.
        listed = (webdataset.shardlists.expand_urls(part) for part in urls.split("::"))
        self.urls = list(dict.fromkeys(itertools.chain.from_iterable(listed)))
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

    def _samples(self, url: str) -> Iterator[tuple[str, str, bytes, Any]]:
        """The caption, the key, the picture and the id of each sample that has the former."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

        of_ids = [] if self.id_key is None else [self.id_key.partition(":")[0].lower()]
        extensions_read = {*self.text_keys, *IMAGES, *of_ids}

        def wanted(file: str) -> bool:
            return (base_plus_ext(file)[1] or "").lower() in extensions_read

        try:
            with gopen(url) as stream:
                files = tar_file_iterator(stream, select_files=wanted)
                for sample in group_by_keys({**file, "__url__": url} for file in files):
                    text = next((sample[key] for key in self.text_keys if key in sample), None)
                    image = next((sample[key] for key in IMAGES if key in sample), None)
                    if text is not None and image is not None:
                        yield text.decode(errors="replace"), sample["__key__"], image, self._id_of(sample)
        except tarfile.TarError as error:
            raise ValueError(f"{url} cannot be read: {error}") from error

    def _id_of(self, sample: Mapping[str, Any]) -> Any:
        if self.id_key is None:
            return None
        value = read_member(sample, self.id_key)
        value = value.decode(errors="replace").strip() if isinstance(value, bytes) else value
        try:
            check_id(self.id_key, value, 0)
        except ValueError as error:
            raise ValueError(
                f"--ids-key {self.id_key}: {named_sample(sample)} has no text or integer there, but {value!r}"
            ) from error
        return value

    def pairs(self) -> Iterator[PairBlock]:
        """See :class:`Table`."""
        self.counts, ids = [], list[Any]()
        for url in self.urls:
            known = (
                (caption, key, identity_of(image), own) for caption, key, image, own in self._samples(url)
            )  # without the picture
            self.counts.append(0)
            while block := list(itertools.islice(known, _BLOCK)):
                self.counts[-1] += len(block)
                captions, keys, identities, of_block = map(list, zip(*block, strict=True))
                if self.id_key is not None:
                    ids += of_block
                    self.ids = ids
                yield PairBlock(captions, keys, identities)

    def pictures(self, rows: Iterable[int]) -> Iterator[tuple[int, str, bytes]]:  # noqa: ARG002
        """See :class:`Table`: none, since :meth:`pairs` has the content of all."""
        yield from ()

    def read(self, source: int, spans: Spans) -> Iterator[list[Sample]]:
        """See :class:`Table`."""
        row, samples = sum(self.counts[:source]), self._samples(self.urls[source])
        for first, last in spans:
            batch = enumerate(itertools.islice(samples, first - row, last - row), first)
            yield [Sample(i, key, caption, source=image) for i, (caption, key, image, _) in batch]
            row = last


Data: TypeAlias = Table | Shards


def some_rows(number: int) -> list[int]:
    """Some of so many rows, from the first to the last."""
    return sorted({i * (number - 1) // (_LOOKED_AT - 1) for i in range(_LOOKED_AT)}) if number else []


def _beginning(path: str) -> bytes:
    """The first bytes of a file; none without a local file."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(2**20)


def _csv(path: str, separator: str, keys: dict[str, str], ids_key: str | None) -> Any:
    """The columns of a CSV file as open_clip's trainer has them: pandas makes 7 of 007, and drops ``NA``.

    Ids are as the file has them.

    Args:
        path: The file.
        separator: Between its columns.
        keys: The columns of pictures and captions by the options that name them.
        ids_key: The column of ids, or None.
    """
    import datasets
    import pandas  # type: ignore[import-untyped]

    if ids_key is not None:
        keys = {**keys, "--ids-key": ids_key}
    try:
        table = pandas.read_csv(path, sep=separator)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error} (--csv-separator {separator!r})") from error
    check_cells(table, path, separator)
    for option, key in keys.items():
        if key not in table.columns:
            hint = "; wrong --csv-separator?" if any(key in str(x) for x in table.columns) else ""
            raise ValueError(f"{option} {key}: {path} has the columns {list(table.columns)}{hint}")
        missing = table[key].isna()
        if missing.any():
            row = int(missing.argmax())
            cell = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)[key].iloc[row]
            raise ValueError(f"row {row} of {path}, column {key!r}: {cell!r} is a missing value to open_clip")
    columns = {key: [str(x) for x in table[key].tolist()] for key in keys.values()}
    if ids_key is not None:
        ids = ids_as_written(path, separator, ids_key, table[ids_key])
        for row, value in enumerate(ids):
            check_id(f"ids in column {ids_key}", value, row)
        if ids_key not in (keys["--csv-img-key"], keys["--csv-caption-key"]):
            columns[ids_key] = ids
    return datasets.Dataset.from_dict(columns)


def ids_as_written(path: str, separator: str, key: str, parsed: Any) -> list[Any]:
    """The ids of a CSV file's rows as it has them: 007 and 7, of which pandas makes one integer, are two.

    Args:
        path: The file.
        separator: Between its columns.
        key: The column of ids.
        parsed: The column as pandas has it. Floats and booleans, which are no ids, stay what they are.
    """
    import pandas

    values = list(parsed.tolist())
    if any(isinstance(value, int) and not isinstance(value, bool) for value in values):
        values = list(pandas.read_csv(path, sep=separator, usecols=[key], dtype=str)[key].tolist())
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
    extension = path.rpartition(".")[2].lower()
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
            command line names, or they have no captions.
    """
    if args.data is None:
        raise ValueError("--data is needed: the pairs, as the trainer has them")
    _check_options(args)
    path, ids_key = str(args.data if path is None else path), getattr(args, "ids_key", None)
    # open_clip's readers of CSV files and shards leave the camera's orientation as it is; datasets turns it.
    background = getattr(args, "background", None)
    as_stored, turned = rendering_of(background, upright=False), rendering_of(background, upright=True)
    kind = kind_of(path, args.dataset_type)
    given = {name: value for name in OPTIONS[kind] if (value := getattr(args, name, None)) is not None}
    values = {**{name: option.default for name, option in OPTIONS[kind].items()}, **given}
    if kind == "webdataset":
        return Shards(path, values["text_key"], as_stored, ids_key)
    import datasets

    datasets.disable_progress_bars()
    if kind == "csv":
        keys = {"--csv-img-key": values["csv_img_key"], "--csv-caption-key": values["csv_caption_key"]}
        table = _csv(path, values["csv_separator"], keys, ids_key)
        image_key, caption_key = keys.values()
        return Table(table, image_key, caption_key, ids_key, as_stored, kind=kind, data=path)
    dataset = opening.dataset(path)
    if isinstance(dataset, datasets.DatasetDict):
        if values["split"] not in dataset:
            raise ValueError(f"--split {values['split']}: {path} has {', '.join(dataset)}")
        dataset = dataset[values["split"]]
    elif "split" in given:
        raise ValueError(f"--split {given['split']}: {path} is a single table, without splits")
    columns = values["image_column"], values["caption_column"]
    return Table(dataset, *columns, ids_key, turned, kind=kind, data=path)


def _check_options(args: Any) -> None:
    """Raise a ValueError for an option that is of none of the kinds of data that are given."""
    places = {"--data": args.data, "--val-data": getattr(args, "val_data", None)}
    kinds = {
        f"{option} {path}": kind_of(str(path), args.dataset_type, option)
        for option, path in places.items()
        if path is not None
    }
    for kind, options in OPTIONS.items():
        for name in options:
            value = getattr(args, name, None)
            if value is not None and kind not in kinds.values():
                given = ", and ".join(f"{place} is {_NOUNS[each]}" for place, each in kinds.items())
                raise ValueError(f"{flag(name)} {value!r} is an option of {_NOUNS[kind]}: {given}")


def rendering_of(background: str | None, *, upright: bool) -> Rendering:
    """The rendering with the colour of ``--background``, if one is given.

    Raises:
        ValueError: It is no colour.
    """
    try:
        return Rendering(upright) if background is None else Rendering(upright, background)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
