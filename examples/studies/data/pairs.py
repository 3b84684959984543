"""Data sets of pictures and captions, as a student and as two frozen encoders see them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from studies.records import Record
from studies.students.measure import Metrics, Model, measure, recorded
from studies.students.model import MAX_WORDS
from studies.students.train import Pairs, Setting, train

from .features import Cache, Side

PICTURE_SIZE = 64
_PADDING, _UNKNOWN = 0, 1


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set, and the trainings of students on it."""

    words: int  # numbers of words
    sides: Mapping[str, Pairs]  # "train", "dev", "test"
    measure: Callable[..., Metrics]  # of a model, on a side, and on other features of it
    fingerprint: str  # of all that the numbers depend on

    def train(self, setting: Setting) -> Record:
        """Train and measure a student."""
        return recorded(
            lambda: train(setting, self.sides["train"], self.words),
            lambda model: self.measure(model, setting.side),
        )


class Thumbnails:
    """Pictures of 64 × 64 pixels, resized without regard to their shape; nothing of the sentences."""

    name = f"{PICTURE_SIZE}x{PICTURE_SIZE} pixels"

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return the pixels, uint8 ``[N, 64, 64, 3]``."""
        size = (PICTURE_SIZE, PICTURE_SIZE)
        return np.stack([np.asarray(one.resize(size, Image.Resampling.BICUBIC)) for one in pictures])

    def sentences(self, sentences: Sequence[str]) -> np.ndarray:
        """Return features of no dimension."""
        return np.zeros((len(sentences), 0), np.uint8)


def vocabulary(captions: Iterable[str]) -> dict[str, int]:
    """Return the numbers, from 2, of the words that occur twice or more, in alphabetical order."""
    counts = Counter(word for caption in captions for word in _words(caption))
    return {word: number for number, word in enumerate(sorted(w for w in counts if counts[w] > 1), start=2)}


def numbered(captions: Sequence[Sequence[str]], words: Mapping[str, int]) -> Tensor:
    """Return the captions' words as numbers, ``[N, S, L]``: 0 fills up, 1 is an unknown word.

    A caption without any word is one unknown word.

    Example:
        >>> numbered([["a cat", "A dog, a cat"]], {"a": 2, "cat": 3}).tolist()
        [[[2, 3, 0, 0], [2, 1, 2, 3]]]
    """
    rows = [
        [words.get(word, _UNKNOWN) for word in _words(caption)[:MAX_WORDS]] or [_UNKNOWN]
        for of in captions
        for caption in of
    ]
    found = torch.full((len(rows), max(map(len, rows))), _PADDING)
    for row, numbers in zip(found, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    return found.unflatten(0, (len(captions), -1))


def _words(caption: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", caption.lower())


def of_photographs(pixels: Cache, features: Cache, train_pictures: int) -> DataSet:
    """Return Flickr8k, whose pixels and features are there."""
    photographs = pixels.photographs
    names = photographs.used(train_pictures)
    captions = {side: [photographs.sentences[name] for name in of] for side, of in names.items()}
    words = vocabulary(caption for of in captions["train"] for caption in of)

    def pairs(side: str) -> Pairs:
        teacher = features.side(names[side])
        return Pairs(
            Side(pixels.side(names[side]).pictures, numbered(captions[side], words)),
            Side(normalize(teacher.pictures, dim=-1), normalize(teacher.sentences, dim=-1)),
        )

    sides = {side: pairs(side) for side in names}

    def measured(model: Model, side: str, of: Side | None = None) -> Metrics:
        judgements = photographs.judgements if side == "test" else None
        return measure(model, of or sides[side].student, names[side], judgements)

    blocks = [path.stem for cache in (pixels, features) for of in names.values() for path in cache.blocks(of)]
    content = "\n".join([*blocks, *map(str, photographs.judgements)])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return DataSet(2 + len(words), sides, measured, fingerprint)
