"""Zero-shot classification of pictures: the nearest of all classes' prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from openmoji_demo.data import TEMPLATES
from torch import Tensor
from torch.nn.functional import normalize

from studies.data.pairs import numbered, words_of
from studies.students.measure import Model

FEWEST_HELD_OUT, FEWEST_TRAINED = 15, 50  # captions with a class
SHORTEST = 3  # letters
NO_CLASSES = frozenset({"and", "for", "the", "with"})


def word_classes(held_out: Sequence[str], trained: Sequence[str]) -> list[str | None]:
    """Return the class of each held-out caption: the one class among its words, None with none or several.

    A class is a word that the constants above allow: of so many captions of either kind, and so many letters.

    Args:
        held_out: Captions, one of each picture.
        trained: Those that the model has learned from.

    Example:
        >>> word_classes(["red heart"] * 15 + ["heart star", "a key"], ["heart"] * 50)[-3:]
        ['heart', 'heart', None]
    """
    words = [set(words_of(caption)) for caption in held_out]
    counts = Counter(word for of in words for word in of)
    learned = Counter(word for caption in trained for word in set(words_of(caption)))
    classes = {
        word
        for word, n in counts.items()
        if n >= FEWEST_HELD_OUT and learned[word] >= FEWEST_TRAINED
        if len(word) >= SHORTEST and word.isalpha() and word not in NO_CLASSES
    }
    return [next(iter(of & classes)) if len(of & classes) == 1 else None for of in words]


def is_right(model: Model, features: Tensor, classes: Sequence[str], words: Mapping[str, int]) -> Tensor:
    """Return for each picture whether its class is the nearest of all classes' prompts, bool ``[N]``.

    Args:
        model: The model.
        features: Of pictures, ``[N, D]``, by the model.
        classes: The pictures'.
        words: The numbers of words by which the model reads.
    """
    names = sorted(set(classes))
    prompts = [[template.format(name) for template in TEMPLATES] for name in names]
    of_names = normalize(model.sentences(numbered(prompts, words)).mean(1), dim=-1)
    labels = torch.tensor([names.index(name) for name in classes])
    return (features @ of_names.T).argmax(1) == labels
