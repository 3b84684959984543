"""The pairs of a training, read as its trainer reads them: tables of pairs and shards of a webdataset."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

from rankloss_features.folder import name_of

_BLOCK = 4096  # pairs that are hashed together
IMAGES = ("png", "jpg", "jpeg", "webp")  # what open_clip's trainer takes for one


class Sample(NamedTuple):
    """A pair, whose picture is opened when it is needed."""

    row: int
    name: str
    caption: str
    open: Callable[[], Any]


Spans = Sequence[tuple[int, int]]
"""First and last row, the latter excluded, of each batch."""


class Data(Protocol):
    """Where pairs come from. :meth:`pairs` is called first, and counts them.

    Attributes:
        about: What ``features.json`` says of it.
        counts: The pairs of each source.
        by_key: Whether its samples come in any order, known by their names.
        skips_broken: Whether the trainer skips pictures that cannot be read.
    """

    about: dict[str, Any]
    counts: list[int]
    by_key: bool
    skips_broken: bool

    def pairs(self) -> Iterator[tuple[list[str], list[str]]]:
        """Captions and image names, in the order of the rows."""

    def spans(self, size: int) -> list[tuple[int, Spans]]:
        """The rows in batches, grouped by the source that has to be read from its start."""

    def read(self, source: int, spans: Spans) -> Iterator[list[Sample]]:
        """The samples of some batches of a source."""


class Table:
    """A ``datasets.Dataset``.

    Args:
        dataset: The dataset.
        image_column: Its images, or their paths.
        caption_column: Its captions.
        **about: What ``features.json`` says of it.

    Raises:
        ValueError: It has no such column, or one of another kind.
    """

    by_key = False
    skips_broken = False

    def __init__(self, dataset: Any, image_column: str, caption_column: str, **about: Any) -> None:
        import datasets

        for column in (image_column, caption_column):
            if column not in dataset.column_names:
                raise ValueError(
                    f"the data have no column {column!r}; they have {', '.join(dataset.column_names)}"
                )
        if dataset.features[caption_column].dtype not in ("string", "large_string"):
            raise ValueError(
                f"column {caption_column!r} must hold one caption per row, a text; got "
                f"{dataset.features[caption_column]}"
            )
        self.about = about
        self.columns = image_column, caption_column
        self._are_images = isinstance(dataset.features[image_column], datasets.Image)
        dataset = dataset.with_format(None).select_columns(list(self.columns))
        if self._are_images:
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.dataset = dataset
        self.counts = [len(dataset)]

    def pairs(self) -> Iterator[tuple[list[str], list[str]]]:
        """See :class:`Data`."""
        import pyarrow.compute  # type: ignore[import-untyped]

        raw = self.dataset.with_format("arrow")
        for first in range(0, len(raw), _BLOCK):
            images, captions = (raw[first : first + _BLOCK][column] for column in self.columns)
            if self._are_images:  # the pictures themselves are not read
                images = pyarrow.compute.struct_field(images, "path")
            yield self._named(first, images.to_pylist(), captions.to_pylist())

    def _named(self, first: int, images: list[Any], captions: list[Any]) -> tuple[list[str], list[str]]:
        empty = next((i for i, caption in enumerate(captions) if not caption), None)
        if empty is not None:
            raise ValueError(f"row {first + empty} has no caption in column {self.columns[1]!r}")
        # A picture without a name is the one of its row.
        names = [name_of(x) if x else f"row {first + i}" for i, x in enumerate(images)]
        return captions, names

    def spans(self, size: int) -> list[tuple[int, Spans]]:
        """See :class:`Data`."""
        rows = len(self.dataset)
        return [(0, [(first, min(first + size, rows))]) for first in range(0, rows, size)]

    def read(self, source: int, spans: Spans) -> Iterator[list[Sample]]:  # noqa: ARG002
        """See :class:`Data`."""
        for first, last in spans:
            block = self.dataset[first:last]
            images, captions = (block[column] for column in self.columns)
            stored = [x if self._are_images else {"path": x} for x in images]
            captions, names = self._named(first, [x["path"] for x in stored], captions)
            yield [
                Sample(first + i, names[i], captions[i], partial(_opened, x.get("bytes") or x["path"]))
                for i, x in enumerate(stored)
            ]


class Shards:
    """A webdataset, whose shards are read as a stream.

    Args:
        urls: As ``--train-data`` has them.
        text_key: The extension of a caption; several, by preference, are separated by ``;``.
    """

    by_key = True
    skips_broken = True

    def __init__(self, urls: str, text_key: str = "txt") -> None:
        import webdataset

        # A shard that is listed twice, to be seen more often, has the same pairs.
        listed = (webdataset.shardlists.expand_urls(part) for part in urls.split("::"))
        self.urls = list(dict.fromkeys(itertools.chain.from_iterable(listed)))
        self.text_keys = text_key.split(";")
        self.about = {"kind": "webdataset", "data": urls}
        self.counts: list[int] = []

    def _samples(self, url: str, *, pictures: bool) -> Iterator[tuple[dict[str, Any], str, str]]:
        """The samples with a caption and a picture, the captions, and the names of the pictures' members."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

        def wanted(file: str) -> bool:
            return (base_plus_ext(file)[1] or "").lower() in {*self.text_keys, *IMAGES}

        def kept(file: dict[str, Any]) -> bool:
            return pictures or base_plus_ext(file["fname"])[1].lower() in self.text_keys

        with gopen(url) as stream, _readable(url):
            files = tar_file_iterator(stream, select_files=wanted)
            named = ({**x, "data": x["data"] if kept(x) else b"", "__url__": url} for x in files)
            for sample in group_by_keys(named):
                text = next((key for key in self.text_keys if key in sample), None)
                image = next((key for key in IMAGES if key in sample), None)
                if text is not None and image is not None:
                    yield sample, sample[text].decode(errors="replace"), image

    def pairs(self) -> Iterator[tuple[list[str], list[str]]]:
        """See :class:`Data`."""
        self.counts = []
        for url in self.urls:
            samples = self._samples(url, pictures=False)
            self.counts.append(0)
            while block := list(itertools.islice(samples, _BLOCK)):
                self.counts[-1] += len(block)
                yield [caption for _, caption, _ in block], [sample["__key__"] for sample, _, _ in block]

    def spans(self, size: int) -> list[tuple[int, Spans]]:
        """See :class:`Data`."""
        ends = list(itertools.accumulate(self.counts))
        starts = [0, *ends[:-1]]
        return [
            (source, [(first, min(first + size, end)) for first in range(start, end, size)])
            for source, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]

    def read(self, source: int, spans: Spans) -> Iterator[list[Sample]]:
        """See :class:`Data`."""
        row = sum(self.counts[:source])
        samples = self._samples(self.urls[source], pictures=True)
        for first, last in spans:
            rest = itertools.islice(samples, first - row, last - row)
            row = last
            yield [
                Sample(first + i, sample["__key__"], caption, partial(_opened, sample[image]))
                for i, (sample, caption, image) in enumerate(rest)
            ]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What libraries raise of a damaged file, as a ValueError that names it."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (tarfile.TarError, DatasetsError) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error


def _opened(picture: bytes | str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture).convert("RGB")


def _table(path: str, separator: str, keys: tuple[str, str]) -> Any:
    """Two columns of a CSV file as texts, on the disk and not in memory."""
    import datasets
    import pandas  # type: ignore[import-untyped]

    try:
        columns = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from error
    for key, flag in zip(keys, ("--csv-img-key", "--csv-caption-key"), strict=True):
        if key not in columns:
            raise ValueError(f"{flag} {key}: {path} has no such column; it has {', '.join(columns)}")
    as_texts = dict.fromkeys(keys, str)
    with _readable(path):
        return datasets.Dataset.from_csv(path, sep=separator, usecols=list(keys), converters=as_texts)


def open_data(args: Any) -> Data:
    """What the command line names.

    Raises:
        ValueError: It is none of these, or has no captions.
    """
    path = str(args.data)
    kind = args.dataset_type
    if kind == "auto":
        is_folder, extension = os.path.isdir(path), path.rpartition(".")[2].lower()
        kind = "datasets" if is_folder else {"csv": "csv", "tsv": "csv", "tar": "webdataset"}.get(extension)
    if kind is None:
        raise ValueError(
            f"--data {path}: no such folder, and no name that ends in .csv, .tsv or .tar: give --dataset-type"
        )
    if kind == "webdataset":
        return Shards(path, args.text_key)
    import datasets

    datasets.disable_progress_bars()
    if kind == "csv":
        keys = args.csv_img_key, args.csv_caption_key
        dataset = _table(path, args.csv_separator, keys)
    else:
        keys = args.image_column, args.caption_column
        saved = any(os.path.isfile(os.path.join(path, x)) for x in ("state.json", "dataset_dict.json"))
        dataset = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
        if isinstance(dataset, datasets.DatasetDict):
            if args.split not in dataset:
                raise ValueError(f"--split {args.split}: {path} has {', '.join(dataset)}")
            dataset = dataset[args.split]
    return Table(dataset, *keys, kind=kind, data=path)
