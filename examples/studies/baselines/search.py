"""Retrieval without any training: a query is seen beside what the training pairs nearest to it have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from studies.data.features import Side
from studies.data.pairs import Pairs


class Search:
    """Features of a picture beside the mean caption of its nearest pictures, and the same of captions.

    Args:
        train: Features of the training pairs.
        k: Neighbours.
    """

    log_scale = torch.zeros(())

    def __init__(self, train: Side, k: int) -> None:
        self.there = normalize(train.pictures, dim=-1), normalize(train.sentences.mean(1), dim=-1)
        self.k = k

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, D + D']``, of pictures' features, ``[N, D]``."""
        own = normalize(pictures, dim=-1)
        return torch.cat([own, self._beside(own, *self.there)], -1) / 2**0.5

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, D + D']``, of captions' features, ``[N, S, D']``."""
        own = normalize(sentences, dim=-1)
        beside = self._beside(own.flatten(0, 1), *reversed(self.there)).unflatten(0, own.shape[:2])
        return torch.cat([beside, own], -1) / 2**0.5

    def _beside(self, own: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        nearest = (own @ keys.T).topk(self.k).indices
        return normalize(values[nearest].mean(1), dim=-1)


def without_encoders(sides: Mapping[str, Pairs]) -> dict[str, Side]:
    """Return pixels minus the mean picture, and TF-IDF of the captions' words, as features."""
    words = 1 + max(int(of.student.sentences.max()) for of in sides.values())
    counts = {name: _counts(of.student.sentences, words) for name, of in sides.items()}
    train = counts["train"].flatten(0, 1)
    rarity = (len(train) / (train > 0).sum(0).clamp_min(1)).log()
    pixels = {name: of.student.pictures.flatten(1).float() for name, of in sides.items()}
    mean = pixels["train"].mean(0)
    return {name: Side(pixels[name] - mean, normalize(counts[name] * rarity, dim=-1)) for name in sides}


def _counts(sentences: Tensor, words: int) -> Tensor:
    """Return how often each word is in a sentence, ``[N, S, words]``; padding and unknown words are none."""
    found = torch.zeros(*sentences.shape[:2], words)
    found.scatter_add_(-1, sentences, (sentences > 1).float())
    return found
