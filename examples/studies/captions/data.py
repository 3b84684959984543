"""Emojis, icons and photographs as the student sees them, and what is measured of it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from openmoji_demo.data import TEMPLATES
from openmoji_demo.metrics import accuracy_at_k
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from studies import icons
from studies.data import drawings, flickr8k
from studies.data.features import Side
from studies.data.pairs import numbered, vocabulary
from studies.records import Record
from studies.students.measure import measure, recorded
from studies.training import kept

from .student import Student, pixels
from .teachers import Teachers
from .train import Setting, train

SIDES = ("train", "dev", "test")
MORE = {"icons-2000": "icons-71680", "icons": "icons-71680", "icons-71680": "icons-all"}
"""The data set whose CLIP is the teacher of another's mimicry."""
TEACHER = Setting("clip", seed=9000, side="dev", batch_size=64, epochs=2, lr=0.004)  # CLIP's best try there


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set before anything is computed."""

    captions: dict[str, list[list[str]]]  # by side
    pictures: Callable[[str], Sequence[Image.Image]]  # of a side
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of photographs, by side
    judgements: Sequence[flickr8k.Judgement] | None = None
    classes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of emojis, by side
    categories: dict[str, list[Sequence[str]]] = dataclasses.field(default_factory=dict)  # of icons, by side


class DataSet:
    """A data set, and the trainings on it.

    Args:
        source: Before anything is computed.
        folder: Of what is computed once.
        more: Returns a data set of more pairs, for a CLIP as teacher.
    """

    def __init__(self, source: Source, folder: Path, more: Callable[[], DataSet] | None = None) -> None:
        self.source = source
        words = vocabulary(text for of in source.captions["train"] for text in of)
        self.word_numbers, self.words = words, 2 + len(words)
        content = hashlib.sha256(repr([source.captions, source.judgements, source.classes]).encode())
        folder = folder / content.hexdigest()[:16]
        self.folder = folder
        sides = (*SIDES, *sorted(source.captions.keys() - set(SIDES)))
        shown = kept(folder / "pixels.pt", lambda: {side: pixels(source.pictures(side)) for side in sides})
        self.sides = {side: Side(shown[side], numbered(source.captions[side], words)) for side in sides}
        for side in sides:
            content.update(shown[side].numpy().tobytes())
        self.fingerprint = content.hexdigest()[:16]
        self.teachers = Teachers(
            source.captions["train"], shown["train"], lambda: source.pictures("train"), folder,
            more and (lambda: more().encode(self)),
        )  # fmt: skip

    def encode(self, other: DataSet) -> dict[str, Tensor]:
        """Return the features of another data set's pairs to train on, of a CLIP that is trained here."""
        model = train(TEACHER, self.sides["train"], self.teachers, self.words)
        captions = numbered(other.source.captions["train"], self.word_numbers)
        with torch.no_grad():
            pictures = model.pictures(other.sides["train"].pictures)
            return {"pictures": pictures, "texts": model.sentences(captions)}

    def train(self, setting: Setting) -> Record:
        """Train and measure a student."""
        return recorded(
            lambda: train(setting, self.sides["train"], self.teachers, self.words),
            lambda model: self.measure(model, setting.side),
        )

    @torch.inference_mode()
    def measure(self, model: Student, side: str) -> dict[str, dict[str, float]]:
        """Return the metrics of a model on a side."""
        judgements = self.source.judgements if side == "test" else None
        found = measure(model, self.sides[side], self.source.names.get(side, ()), judgements)
        if of := self.source.classes.get(side):
            names = sorted(set(of))
            prompts = [[template.format(name) for template in TEMPLATES] for name in names]
            classes = normalize(model.sentences(numbered(prompts, self.word_numbers)).mean(1), dim=-1)
            scores = model.pictures(self.sides[side].pictures) @ classes.T
            labels = torch.tensor([names.index(name) for name in of])
            found["zero-shot"] = {"top-1": accuracy_at_k(scores, labels, (1,))[1]}
        return found


def emojis(limit: int | None, split: int) -> Source:
    """Return the emojis of a split, with the sub-groups of those held out."""
    sides, of = drawings.emojis(limit, split), drawings.split_emojis(limit, split)
    classes = {side: [one.subgroup for one in of[side]] for side in ("dev", "test")}
    return Source(_captions(sides), lambda side: sides[side].pictures, classes=classes)


def icons_of(folder: Path, sizes: Sequence[int], split: int) -> Source:
    """Return the first icons of a split, without sets of emojis, of a finished build."""

    def sides() -> drawings.Sides:  # drawn again when they are asked for: gigabytes
        return drawings.icons(icons.built(folder), *sizes, split)

    return Source(_captions(sides()), lambda side: sides()[side].pictures)


def photographs(folder: Path, sizes: Sequence[int], split: int) -> Source:
    """Return Flickr8k, of so many pictures to train on so many captions, with people's judgements.

    Raises:
        ValueError: For another split than its own, 0.
    """
    if split:
        raise ValueError(f"split: photographs have split 0 alone, got {split}")
    train_pictures, each = sizes
    read = flickr8k.read(folder)
    names = read.used(train_pictures)
    captions = {side: [read.sentences[name] for name in names[side]] for side in SIDES}
    captions["train"] = [of[:each] for of in captions["train"]]
    opened = {side: Opened([read.path(name) for name in names[side]]) for side in SIDES}
    return Source(captions, opened.__getitem__, names, read.judgements)


class Opened(Sequence[Image.Image]):
    """Pictures that are opened one at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        """Return their number."""
        return len(self.paths)

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        """Return one, or the list of a slice."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        with Image.open(self.paths[place]) as picture:
            return picture.convert("RGB")


def _captions(sides: drawings.Sides) -> dict[str, list[list[str]]]:
    return {side: [list(one) for one in of.captions] for side, of in sides.items()}


class Splits:
    """The splits of a data set, each of which is made when it is trained on.

    Args:
        make: Returns a split.
    """

    def __init__(self, make: Callable[[int], DataSet]) -> None:
        self.of = functools.cache(make)

    def fingerprint(self, setting: Setting) -> str:
        """Return the fingerprint of a setting's split."""
        return self.of(setting.split).fingerprint

    def train(self, setting: Setting) -> Record:
        """Train and measure a student on a setting's split."""
        return self.of(setting.split).train(setting)


def sources(sizes: Mapping[str, Any], folders: argparse.Namespace) -> dict[str, Callable[[int], Source]]:
    """Return functions of a split by the names of the data sets that are there.

    Args:
        sizes: By the data sets' names.
        folders: Of the icons, which are there if they are built, and of the photographs (data), or None.
    """
    found: dict[str, Callable[[int], Source]] = {}
    for name, size in sizes.items():
        if name.startswith("icons"):
            if (folders.icons / "manifest.json").is_file():
                found[name] = functools.partial(icons_of, folders.icons, size)
        elif name.startswith("photographs"):
            if folders.data is not None:
                found[name] = functools.partial(photographs, folders.data, size)
        else:
            found[name] = functools.partial(emojis, size)
    return found


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Splits]:
    """Return the data sets that are there."""
    found: dict[str, Splits] = {}
    for name, make in sources(sizes.sizes, options).items():
        folder = options.output / "captions" / sizes.preset / name
        found[name] = Splits(functools.partial(_made, make, folder, found, MORE.get(name)))
    return found


def _made(
    make: Callable[[int], Source], folder: Path, others: Mapping[str, Splits], more: str | None, split: int
) -> DataSet:
    return DataSet(make(split), folder, (lambda: others[more].of(split)) if more in others else None)
