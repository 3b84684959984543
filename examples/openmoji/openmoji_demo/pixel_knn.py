"""The baseline that learns nothing: the most similar training pictures, pixel by pixel, lend their words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 5


class PixelKNN:
    """Nearest training pictures by Euclidean distance between raw pixels.

    Args:
        images: The training pictures, all of one size.
        captions: One caption for each of them: name and keywords.
        subgroups: The sub-group of each of them.
        groups: The group of each of them.
        k: How many neighbours vote.
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        subgroups: Sequence[str],
        groups: Sequence[str],
        k: int = NEIGHBOURS,
    ) -> None:
        self.k = k
        self._labels = {"subgroup": np.asarray(subgroups), "group": np.asarray(groups)}
        self._index = NearestNeighbors(n_neighbors=len(images), algorithm="brute").fit(_pixels(images))
        # Inverse document frequency: that two emojis share "kimono" says more than that they share "face".
        self._vectorizer = TfidfVectorizer(binary=True)
        self._words = self._vectorizer.fit_transform(captions)

    def caption_scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """Return how well each caption fits each picture: TF-IDF cosine with its neighbours' captions."""
        _, neighbours = self._index.kneighbors(_pixels(images), n_neighbors=self.k)
        candidates = self._vectorizer.transform(captions)
        scores = sum(self._words[neighbours[:, j]] @ candidates.T for j in range(self.k))
        # Rounded, so that equal scores are equal whatever the order of summation: they count as ties.
        return torch.from_numpy(np.asarray(scores.todense()).round(9))

    def class_scores(self, images: Sequence[Image.Image], level: str, classes: Sequence[str]) -> torch.Tensor:
        """Return the neighbours' votes for each class; equal votes go to the class with the nearest picture.

        Args:
            images: The pictures to classify.
            level: ``"subgroup"`` or ``"group"``.
            classes: The classes, in the order of the columns.
        """
        distances, neighbours = self._index.kneighbors(_pixels(images))
        labels = self._labels[level][neighbours]
        votes = np.stack([(labels[:, : self.k] == name).sum(axis=1) for name in classes], axis=1)
        nearest = np.stack(
            [np.where(labels == name, distances, np.inf).min(axis=1) for name in classes], axis=1
        )
        return torch.from_numpy(votes + 1 / (2 + nearest))


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    # Whole numbers in float64: distances are exact, and do not depend on the order of summation.
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.float64).ravel() for image in images])
