"""Captions as numbers of words, as a student sees them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

MAX_WORDS = 40  # of a caption; the others are left out
_PADDING, _UNKNOWN = 0, 1


def vocabulary(captions: Iterable[str]) -> dict[str, int]:
    """Return the numbers, from 2, of the words that occur twice or more, in alphabetical order."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    return {word: number for number, word in enumerate(sorted(w for w in counts if counts[w] > 1), start=2)}


def numbered(captions: Sequence[Sequence[str]], words: Mapping[str, int]) -> Tensor:
    """Return the captions' words as numbers, ``[N, S, L]``: 0 fills up, 1 is an unknown word.

    A caption without any word is one unknown word.

    Example:
        >>> numbered([["a cat", "A dog, a cat"]], {"a": 2, "cat": 3}).tolist()
        [[[2, 3, 0, 0], [2, 1, 2, 3]]]
    """
    rows = [
        [words.get(word, _UNKNOWN) for word in words_of(caption)[:MAX_WORDS]] or [_UNKNOWN]
        for of in captions
        for caption in of
    ]
    found = torch.full((len(rows), max(map(len, rows))), _PADDING)
    for row, numbers in zip(found, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    return found.unflatten(0, (len(captions), -1))


def words_of(caption: str) -> list[str]:
    """Return a caption's words in small letters."""
    return re.findall(r"[a-z0-9]+", caption.lower())
