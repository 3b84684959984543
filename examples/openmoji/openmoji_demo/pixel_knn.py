"""The baseline that learns nothing, on pictures of emojis; see :mod:`clip_evaluation.pixel_knn`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from clip_evaluation import pixel_knn
from PIL import Image


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
        k: int = pixel_knn.NEIGHBOURS,
    ) -> None:
        self.k = k
        self._images = _pixels(images)
        self._captions = captions
        self._labels = {"subgroup": subgroups, "group": groups}

    def caption_scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """Return how well each caption fits each picture: TF-IDF cosine with its neighbours' captions."""
        _, neighbours = pixel_knn.nearest(self._images, _pixels(images), self.k)
        return pixel_knn.caption_scores(neighbours, self._captions, captions)

    def class_scores(self, images: Sequence[Image.Image], level: str, classes: Sequence[str]) -> torch.Tensor:
        """Return the neighbours' votes for each class; equal votes go to the class with the nearest picture.

        Args:
            images: The pictures to classify.
            level: ``"subgroup"`` or ``"group"``.
            classes: The classes, in the order of the columns.
        """
        return pixel_knn.class_scores(self._images, self._labels[level], _pixels(images), classes, k=self.k)


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB")) for image in images])
