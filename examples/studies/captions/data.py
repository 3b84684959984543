"""Emojis, icons and photographs as the student sees them, and what is measured of it."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from openmoji_demo.data import TEMPLATES, load_emojis, split_by_concept
from openmoji_demo.metrics import accuracy_at_k
from PIL import Image
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


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set before anything is computed."""

    captions: dict[str, list[list[str]]]  # by side
    pictures: Callable[[str], Sequence[Image.Image]]  # of a side
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of photographs, by side
    judgements: Sequence[flickr8k.Judgement] | None = None
    classes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of emojis, by side


class DataSet:
    """A data set, and the trainings on it."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        words = vocabulary(text for of in source.captions["train"] for text in of)
        self.word_numbers, self.words = words, 2 + len(words)
        content = hashlib.sha256(repr([source.captions, source.judgements, source.classes]).encode())
        folder = folder / content.hexdigest()[:16]
        shown = kept(folder / "pixels.pt", lambda: {side: pixels(source.pictures(side)) for side in SIDES})
        self.sides = {side: Side(shown[side], numbered(source.captions[side], words)) for side in SIDES}
        for side in SIDES:
            content.update(shown[side].numpy().tobytes())
        self.fingerprint = content.hexdigest()[:16]
        self.teachers = Teachers(
            source.captions["train"], shown["train"], lambda: source.pictures("train"), folder
        )

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


def emojis(limit: int | None) -> Source:
    """Return the emojis of :func:`studies.data.drawings.emojis`, with the sub-groups of those held out."""
    sides = drawings.emojis(limit)
    test = split_by_concept(load_emojis()[:limit])
    held_out = {"dev": split_by_concept(test.train, 1).test, "test": test.test}
    classes = {side: [one.subgroup for one in of] for side, of in held_out.items()}
    return Source(_captions(sides), lambda side: sides[side].pictures, classes=classes)


def icons_of(folder: Path, sizes: Sequence[int]) -> Source:
    """Return the first icons, without sets of emojis, of a finished build."""

    def sides() -> drawings.Sides:  # drawn again when they are asked for: gigabytes
        return drawings.icons(icons.built(folder), *sizes)

    return Source(_captions(sides()), lambda side: sides()[side].pictures)


def photographs(folder: Path, train_pictures: int) -> Source:
    """Return Flickr8k, with people's judgements of its test side."""
    read = flickr8k.read(folder)
    names = read.used(train_pictures)
    captions = {side: [read.sentences[name] for name in names[side]] for side in SIDES}
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


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, DataSet]:
    """Return the data sets that are there: icons if they are built, photographs if their folder is given."""
    found = {"emojis": emojis(sizes.sizes["emojis"])}
    if (options.icons / "manifest.json").is_file():
        names = (name for name in sizes.sizes if name.startswith("icons"))
        found |= {name: icons_of(options.icons, sizes.sizes[name]) for name in names}
    if options.data is not None:
        found["photographs"] = photographs(options.data, sizes.sizes["photographs"])
    kept_in = options.output / "captions" / sizes.preset
    return {name: DataSet(source, kept_in / name) for name, source in found.items()}
