"""Retrieval without any training: a query is seen beside what the training pairs nearest to it have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from studies.data.features import Side


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
        """Return the normalised mean of the values whose keys are the k nearest to each row."""
        nearest = (own @ keys.T).topk(self.k).indices
        return normalize(values[nearest].mean(1), dim=-1)
