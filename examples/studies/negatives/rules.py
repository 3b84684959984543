"""Hard negatives by rule: a caption with one other word, or with two nouns that changed places."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Within a group no word means another's; none begins with a vowel, so "a" and "an" tell nothing.
_NOUNS = (
    "man woman boy girl",
    "dog cat horse bird",
    "ball frisbee stick rope",
    "bike car motorcycle boat skateboard",
    "beach street pool mountain forest",
    "shirt jacket dress hat helmet",
)
_GROUPS = {
    "colour": ("black white brown red blue green yellow pink purple",),
    "number": ("two three four five six",),
    "object": (*_NOUNS, "men women boys girls", "dogs cats horses birds"),
}
_SWAP = "swap"
_SWAPPED = set(" ".join(_NOUNS).split())
KINDS = (*_GROUPS, _SWAP)


class Negative(NamedTuple):
    """A wrong caption and its rule; both are empty where no rule applies."""

    text: str = ""
    kind: str = ""


def words_of(text: str) -> list[str]:
    """Return the words, in lower case."""
    return re.findall("[a-z]+", text.lower())


def negatives(captions: Sequence[Sequence[str]], counts: Counter[str]) -> list[list[Negative]]:
    """Return a hard negative of every caption by one of the rules that apply, at every call the same.

    The other word is drawn by its count, from those that no caption of the picture has: it may be true.

    Args:
        captions: Of each picture.
        counts: Of the words in the training captions.

    Example:
        >>> captions = ["A man in red", "It rains"]
        >>> negatives([captions], Counter(["blue", "red", "man"]))
        [[Negative(text='a man in blue', kind='colour'), Negative(text='', kind='')]]
    """
    return [[_negative(text, set(words_of(" ".join(of))), counts) for text in of] for of in captions]


def _negative(caption: str, said: set[str], counts: Mapping[str, int]) -> Negative:
    parts, draw = re.split("([a-z]+)", caption.lower()), random.Random(caption)
    options: dict[str, list[tuple[int, int | dict[str, int]]]] = {}  # a place, and another or other words
    for kind, groups in _GROUPS.items():
        for place, group in itertools.product(range(len(parts)), map(str.split, groups)):
            others = {word: counts[word] for word in group if word not in said and counts[word]}
            if parts[place] in group and others:
                options.setdefault(kind, []).append((place, others))
    nouns = [place for place, part in enumerate(parts) if part in _SWAPPED]
    for first, second in itertools.combinations(nouns, 2):
        if parts[first] != parts[second]:
            options.setdefault(_SWAP, []).append((first, second))
    if not options:
        return Negative()
    kind = draw.choice(list(options))
    place, other = draw.choice(options[kind])
    if isinstance(other, int):
        parts[place], parts[other] = parts[other], parts[place]
    else:
        (parts[place],) = draw.choices(list(other), list(other.values()))
    return Negative("".join(parts), kind)
