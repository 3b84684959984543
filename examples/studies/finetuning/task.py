"""Pairs in memory: icons to pretrain on, emojis to fine-tune on, and held-out ones of both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from open_clip import tokenize
from openmoji_demo.data import (
    Emoji,
    held_out_caption,
    load_emojis,
    read_svg,
    split_by_concept,
    train_captions,
)
from openmoji_demo.drawing import rasterise
from torch import Tensor

from studies.icons.draw import SIZE as DRAWN
from studies.icons.draw import pixels
from studies.icons.load import Icons
from studies.icons.records import Record

SIZE = 32  # pixels
CONTEXT = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures with one or several captions each."""

    pictures: Tensor  # uint8 [N, 3, SIZE, SIZE]
    captions: Tensor  # int64 [N, K, CONTEXT]


@dataclasses.dataclass(frozen=True)
class Part:
    """A division of the new data, and the held-out pairs of both."""

    new: Pairs  # to fine-tune on
    old_held_out: Pairs
    new_held_out: Pairs


@dataclasses.dataclass(frozen=True)
class Task:
    """The old data, and two divisions of the new: one to choose settings on, and the test."""

    old: Pairs  # to pretrain on
    parts: dict[str, Part]  # "choice", "test"

    @property
    def pairs(self) -> dict[str, Pairs]:
        """All pairs, by what they are for."""
        parts = self.parts.items()
        named = {f"{side}: {name}": of for side, part in parts for name, of in vars(part).items()}
        return {"old": self.old, **named}

    @property
    def data(self) -> str:
        """Fingerprint of all pictures and captions."""
        digest = hashlib.sha256()
        for pairs in self.pairs.values():
            digest.update(pairs.pictures.numpy())
            digest.update(pairs.captions.numpy())
        return digest.hexdigest()[:16]


def read(icons: Icons, *, pretrained: int, held_out: int, emojis: int | None = None) -> Task:
    """Return the task: so many icons to pretrain on, so many held-out ones, all emojis or the first ones.

    Sets of emojis among the icons are left out.
    """
    every = load_emojis()[:emojis]
    test = split_by_concept(every)
    choice = split_by_concept(test.train, 1)

    def records(side: str) -> list[Record]:
        return [one for one in icons.part(side).records if "moji" not in one.set]

    def held(side: str) -> Pairs:
        chosen = [one for one in records(side) if one.retrieval][:held_out]
        return _icons(icons, chosen, [one.caption for one in chosen])

    old = records("train")[:pretrained]
    return Task(
        _icons(icons, old, [one.text for one in old]),
        {
            side: Part(
                _emojis(split.train, [train_captions(one) for one in split.train]),
                held(of_icons),
                _emojis(split.test, [[held_out_caption(one)] for one in split.test]),
            )
            for side, of_icons, split in (("choice", "validation", choice), ("test", "test", test))
        },
    )


def _icons(icons: Icons, records: Sequence[Record], texts: Sequence[str]) -> Pairs:
    images = icons.images[[one.index for one in records]]
    squares = images.reshape(len(images), SIZE, DRAWN // SIZE, SIZE, DRAWN // SIZE, 3)
    return _pairs(squares.mean((2, 4)).round().astype(np.uint8), [[text] for text in texts])


def _emojis(emojis: Sequence[Emoji], captions: Sequence[Sequence[str]]) -> Pairs:
    drawn = [pixels(rasterise(read_svg(one.hexcode), DRAWN), averaged=DRAWN // SIZE) for one in emojis]
    return _pairs(np.stack(drawn), captions)


def _pairs(images: np.ndarray, captions: Sequence[Sequence[str]]) -> Pairs:
    tokens = tokenize([text for of in captions for text in of], context_length=CONTEXT)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Pairs(pictures, tokens.unflatten(0, (len(captions), -1)))
