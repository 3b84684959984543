"""Emojis, icons, photographs and a vendor's drawings: captions and pictures by side."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openmoji_demo.drawing import rasterise
from PIL import Image

from studies import icons
from studies.icons import draw, labels, package

from . import drawings, flickr8k

SIDES = ("train", "dev", "test")
SECOND = "second"  # the side of more held-out concepts
_TEST, _DEV = 0.25, 0.2  # of a vendor's concepts


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set before anything is computed."""

    captions: dict[str, list[list[str]]]  # by side
    pictures: Callable[[str], Sequence[Image.Image]]  # of a side
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of photographs, by side
    judgements: Sequence[flickr8k.Judgement] | None = None
    classes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of emojis, by side


def emojis(limit: int | None, split: int) -> Source:
    """Return the emojis of a split, with the sub-groups of those held out."""
    sides, of = drawings.emojis(limit, split), drawings.split_emojis(limit, split)
    classes = {side: [one.subgroup for one in of[side]] for side in ("dev", "test")}
    return Source(_captions(sides), lambda side: sides[side].pictures, classes=classes)


def icons_of(folder: Path, sizes: Sequence[int], split: int) -> Source:
    """Return the first icons of a split, without sets of emojis, of a finished build.

    A second side of as many held-out concepts stands beside the test side.
    """
    build = icons.built(folder)
    train_size, held_out = sizes
    records = drawings.icon_records(build, train_size, held_out, 2 * held_out, split)
    records = {**records, "test": records["test"][:held_out], SECOND: records["test"][held_out:]}

    def side(name: str) -> drawings.Drawings:
        return drawings.drawn(build, records[name], name)

    texts = {name: [list(one) for one in side(name).captions] for name in records}
    return Source(texts, lambda name: side(name).pictures)


def vendor(tarball: Path, prefix: str, split: int) -> Source:
    """Return an icon set of the npm package, split by its drawings' concepts.

    Each held-out concept has one drawing; texts to train on are the captions in the icons' templates.

    Raises:
        ValueError: If the package has no such set.
    """
    found: dict[str, list[package.Icon]] = {side: [] for side in SIDES}
    seen = set()
    every = package.icons_of(prefix, _one_set(tarball, prefix))
    for one in sorted(every, key=lambda one: drawings.hash_of(f"{split}/{one.set}/{one.name}")):
        side = drawings.side_of(f"{split}/{one.concept}", _TEST, _DEV)
        if side == "train" or one.concept not in seen:
            found[side].append(one)
        seen.add(one.concept)

    def of_one(icon: package.Icon, side: str) -> list[str]:
        forms = labels.TEMPLATES if side == "train" else ("{}",)
        return [form.format(icon.caption) for form in forms]

    def pictures(side: str) -> list[Image.Image]:
        return [Image.fromarray(draw.pixels(rasterise(one.svg, draw.SIZE))) for one in found[side]]

    texts = {side: [of_one(one, side) for one in of] for side, of in found.items()}
    return Source(texts, pictures)


def _one_set(tarball: Path, prefix: str) -> dict[str, Any]:
    """Return an icon set of the package as its JSON says.

    Raises:
        ValueError: If the package has no such set.
    """
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if Path(member.name).parts[1:] == ("json", f"{prefix}.json"):
                content: dict[str, Any] = json.load(archive.extractfile(member))
                return content
    raise ValueError(f"{tarball} holds no icon set {prefix!r}")


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
    """Return the captions of each side's pictures as lists."""
    return {side: [list(one) for one in of.captions] for side, of in sides.items()}


def sources(sizes: Mapping[str, Any], folders: argparse.Namespace) -> dict[str, Callable[[int], Source]]:
    """Return functions of a split by the names of the data sets that are there.

    Args:
        sizes: By the data sets' names: of icons to train on and held out, of photographs and captions of
            each, of emojis; of a vendor's drawings its set in the icons' package.
        folders: Of the icons, which are there if they are built, and of the photographs (data), or None.
    """
    has_icons = (folders.icons / "manifest.json").is_file()
    found: dict[str, Callable[[int], Source]] = {}
    for name, size in sizes.items():
        if name.startswith("emojis"):
            found[name] = functools.partial(emojis, size)
        elif name.startswith("photographs"):
            if folders.data is not None:
                found[name] = functools.partial(photographs, folders.data, size)
        elif has_icons and isinstance(size, str):
            tarball = package.fetch(folders.icons / "cache")
            found[name] = functools.partial(vendor, tarball, size)
        elif has_icons:
            found[name] = functools.partial(icons_of, folders.icons, size)
    return found
