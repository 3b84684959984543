"""Emojis and icons: drawings with their names, as a student and as two frozen encoders see them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from openmoji_demo.data import (
    Emoji,
    draw,
    held_out_caption,
    load_emojis,
    read_svg,
    split_by_concept,
    train_captions,
)
from PIL import Image
from torch.nn.functional import normalize

from studies.icons.load import Icons
from studies.icons.records import Record
from studies.icons.split import TEST, VALIDATION
from studies.students.measure import Metrics, Model, measure
from studies.students.train import Pairs

from .features import Encoders, Side, save
from .pairs import DataSet, Thumbnails, numbered, vocabulary

_OTHER_SET = "moji"  # in the names of the icons' sets of emojis, which are left out


@dataclasses.dataclass(frozen=True)
class Drawings:
    """Pictures, each with the same number of captions."""

    pictures: Sequence[Image.Image]
    captions: Sequence[Sequence[str]]


Sides = Mapping[str, Drawings]  # "train", "dev", "test"


def split_emojis(limit: int | None = None, split: int = 0) -> dict[str, tuple[Emoji, ...]]:
    """Return the sides of all emojis, or of the first so many.

    In split 0 the demo's held-out concepts are tested on, and its split 1 of the others is what settings are
    chosen on; other splits hold out other concepts.
    """
    test = split_by_concept(load_emojis()[:limit], 2 * split)
    dev = split_by_concept(test.train, 2 * split + 1)
    return {"train": dev.train, "dev": dev.test, "test": test.test}


def emojis(limit: int | None = None, split: int = 0) -> Sides:
    """Return the emojis of :func:`split_emojis` with their captions."""
    sides = split_emojis(limit, split)

    def searched(of: Sequence[Emoji]) -> Drawings:
        return Drawings([draw(read_svg(one.hexcode)) for one in of], [[held_out_caption(one)] for one in of])

    pictures = [draw(read_svg(one.hexcode)) for one in sides["train"]]
    train = Drawings(pictures, [train_captions(one) for one in sides["train"]])
    return {"train": train, "dev": searched(sides["dev"]), "test": searched(sides["test"])}


def icons(build: Icons, train: int, held_out: int, split: int = 0) -> Sides:
    """Return so many icons to train on, and so many of other concepts to choose and to test on."""
    return {
        name: drawn(build, of, name)
        for name, of in icon_records(build, train, held_out, held_out, split).items()
    }


def icon_records(build: Icons, train: int, dev: int, test: int, split: int = 0) -> dict[str, list[Record]]:
    """Return the records of so many icons of each side, without those of sets of emojis.

    Split 0 is the build's own; others hold out other concepts.
    """
    counts, found = {"train": train, "dev": dev, "test": test}, {}
    for name, every in _split_icons(build, split).items():
        found[name] = [one for one in every if _OTHER_SET not in one.set][: counts[name]]
        if len(found[name]) < counts[name]:
            raise ValueError(
                f"{build.folder}: {counts[name]} icons are needed of {name}, got {len(found[name])}"
            )
    return found


def drawn(build: Icons, records: Sequence[Record], side: str) -> Drawings:
    """Return icons with their texts to train on, or with their captions."""
    pictures = [Image.fromarray(build.images[one.index]) for one in records]
    return Drawings(pictures, [[one.text if side == "train" else one.caption] for one in records])


def _split_icons(build: Icons, split: int) -> dict[str, list[Record]]:
    """Return the records of each side in a random order, of held-out concepts one each."""
    parts = {"train": "train", "dev": "validation", "test": "test"}
    sides = {side: build.part(part).records for side, part in parts.items()}
    if not split:
        return {side: [one for one in of if one.retrieval or side == "train"] for side, of in sides.items()}
    every = [one for of in sides.values() for one in of if _OTHER_SET not in one.set]
    found: dict[str, list[Record]] = {side: [] for side in sides}
    seen = set()
    for one in sorted(every, key=lambda one: hash_of(f"{split}/{one.set}/{one.name}")):
        side = side_of(f"{split}/{one.concept}")
        if side == "train" or one.concept not in seen:
            found[side].append(one)
        seen.add(one.concept)
    return found


def side_of(concept: str, test: float = TEST, dev: float = VALIDATION) -> str:
    """Return the side of a concept, by its hash; ``test`` and ``dev`` are the shares of these sides."""
    share = int(hash_of(concept), 16) / 16**16
    return "test" if share < test else "dev" if share < test + dev else "train"


def hash_of(text: str) -> str:
    """Return a number in hexadecimal that orders texts at random."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_set(sides: Sides, folder: Path, kind: type[Encoders]) -> DataSet:
    """Return drawings as a data set; the folder keeps the features, of which missing ones are computed."""
    pixels = {side: Thumbnails().pictures(of.pictures) for side, of in sides.items()}
    load = functools.cache(kind)  # once for all sides, and only where features are missing
    kept = {side: _features(of, pixels[side], folder, kind.name, load) for side, of in sides.items()}
    words = vocabulary(caption for of in sides["train"].captions for caption in of)

    def pairs(side: str) -> Pairs:
        of = sides[side]
        with np.load(kept[side]) as found:
            teacher = {of: torch.from_numpy(found[of]).float() for of in ("pictures", "sentences")}
        return Pairs(
            Side(torch.from_numpy(pixels[side]), numbered(of.captions, words)),
            Side(
                normalize(teacher["pictures"], dim=-1),
                normalize(teacher["sentences"], dim=-1).unflatten(0, (len(of.captions), -1)),
            ),
        )

    found = {side: pairs(side) for side in sides}

    def measured(model: Model, side: str, of: Side | None = None) -> Metrics:
        return measure(model, of or found[side].student, ())

    fingerprint = hashlib.sha256("\n".join(path.stem for path in kept.values()).encode()).hexdigest()[:16]
    return DataSet(2 + len(words), found, measured, fingerprint)


def _features(
    of: Drawings, pixels: np.ndarray, folder: Path, encoders_name: str, load: Callable[[], Encoders]
) -> Path:
    """Return the file of the encoders' features of a side, named by all that they depend on."""
    sentences = [text for captions in of.captions for text in captions]
    content = hashlib.sha256("\n".join([encoders_name, str(pixels.shape), *sentences]).encode())
    content.update(pixels)
    for picture in of.pictures:
        content.update(picture.tobytes())
    path = folder / f"{content.hexdigest()[:16]}.npz"
    if not path.is_file():
        encoders = load()
        save(path, pictures=encoders.pictures(of.pictures), sentences=encoders.sentences(sentences))
    return path
