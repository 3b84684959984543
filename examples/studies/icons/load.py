"""Loads a finished build: pictures, captions and labels as arrays. The README shows how it is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from .labels import Labelled
from .records import Record, read_table


@dataclasses.dataclass(frozen=True)
class Part:
    """One block of the data: a side of the trained sets, or of a shift.

    The order is random, so the first n pictures are a random sample.
    """

    images: np.ndarray  # uint8 [n, 64, 64, 3], a memory-mapped view of the file
    records: list[Record]

    @property
    def texts(self) -> list[str]:
        """The training text of every picture: the caption in a template, at times with the style."""
        return [record.text for record in self.records]


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """One picture for each held-out concept, with one or several captions."""

    images: np.ndarray  # uint8 [n, 64, 64, 3]
    captions: list[str]  # of all pictures, one after the other
    image_of: np.ndarray  # int64 [C]: the position of each caption's picture
    index: np.ndarray  # the records' numbers


@dataclasses.dataclass(frozen=True)
class Items:
    """Labelled pictures of one side."""

    images: np.ndarray  # uint8 [n, 64, 64, 3]
    labels: np.ndarray  # int64 [n]: the class of each
    index: np.ndarray  # the records' numbers

    def first(self, limit: int) -> Items:
        """Return the first ones; their order is random, so they are a random sample."""
        return Items(self.images[:limit], self.labels[:limit], self.index[:limit])


@dataclasses.dataclass(frozen=True)
class LabelledSet(Labelled):
    """A labelled set for zero-shot classification and probes."""

    images: np.ndarray = dataclasses.field(kw_only=True)  # of the whole build

    def side(self, side: str) -> Items:
        """Return the pictures and labels of ``train``, ``validation`` or ``test``."""
        index, labels = (np.array(numbers[side], dtype=np.int64) for numbers in (self.index, self.label))
        return Items(self.images[index], labels, index)

    train = property(lambda self: self.side("train"), doc="What a probe is trained on: trained concepts.")
    validation = property(lambda self: self.side("validation"), doc="What its regularisation is chosen on.")
    test = property(lambda self: self.side("test"), doc="Held-out concepts, which zero-shot and probe score.")


class Icons:
    """A finished build: its pictures (mapped into memory), records and labelled sets, shifts last."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished build: python -m studies.icons --output {folder}"
            )
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")
        self.records = read_table(folder / "records.csv")
        stored = ((name, folder / "labels" / f"{name}.json") for name in self.manifest["labelled"])
        self.labelled = {
            name: LabelledSet(**json.loads(path.read_text(encoding="utf-8")), images=self.images)
            for name, path in stored
        }

    @property
    def shifts(self) -> list[str]:
        """The names of the shifts."""
        return list(dict.fromkeys(name.split("/")[0] for name in self.manifest["ranges"] if "/" in name))

    def part(self, name: str) -> Part:
        """Return a block: ``train``, ``validation``, ``test``, or for instance ``noto/test``.

        Raises:
            KeyError: If there is no such block.
        """
        ranges = self.manifest["ranges"]
        if name not in ranges:
            raise KeyError(f"no part {name!r}; there are {', '.join(ranges)}")
        start, stop = ranges[name]
        return Part(self.images[start:stop], self.records[start:stop])

    def retrieval(self, name: str = "test") -> Retrieval:
        """Return the retrieval items of a block: ``validation``, ``test``, or for instance ``noto/test``.

        Raises:
            KeyError: If there is no such block.
            ValueError: If it has no such items, as ``train``.
        """
        chosen = [record for record in self.part(name).records if record.retrieval]
        if not chosen:
            raise ValueError(
                f"{name!r} holds no retrieval items: validation and the parts called test have some"
            )
        index = np.array([record.index for record in chosen], dtype=np.int64)
        captions = [caption for record in chosen for caption in record.captions]
        image_of = np.repeat(np.arange(len(chosen)), [len(record.captions) for record in chosen])
        return Retrieval(self.images[index], captions, image_of, index)


def load(folder: str | Path) -> Icons:
    """Open what ``python -m studies.icons`` wrote into ``folder``.

    Raises:
        FileNotFoundError: If the folder holds no finished build.
    """
    return Icons(Path(folder))
