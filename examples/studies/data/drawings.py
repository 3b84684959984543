"""Emojis and icons: drawings with their names, split by concept."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

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

from studies.icons.load import Icons
from studies.icons.records import Record
from studies.icons.split import TEST, VALIDATION

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

    Raises:
        ValueError: A side has fewer icons.
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
    """Return the records of each side in a random order, of held-out concepts one each.

    Those of sets of emojis are left out of all splits but 0, the build's own.
    """
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
