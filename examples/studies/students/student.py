"""The student: a few convolutions, the mean of word vectors, and one space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

SIZE, CROP = 32, 28  # pixels of a picture's side, and those of them that are seen
WIDTH = 256  # of the common space
SCALE = 1 / 0.07  # of the similarities, at the start
_CHANNELS = (16, 32, 64, 128)
_WORDS = 128


class Student(nn.Module):
    """Two towers that learn from scratch, and the scale of the similarities.

    Args:
        words: How many numbers words can have, with 0 and 1; see :func:`studies.data.pairs.numbered`.
        scale: Of the similarities, at the start.
    """

    def __init__(self, words: int, scale: float = SCALE) -> None:
        super().__init__()
        self.convolutions = convolutions(_CHANNELS)
        self.words = nn.EmbeddingBag(words, _WORDS, mode="mean", padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.1)
        self.of_pictures, self.of_sentences = projection(_CHANNELS[-1]), projection(_WORDS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.to(memory_format=torch.channels_last)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, 256]``, of the middle of pictures, uint8 ``[N, H, W, 3]``."""
        maps = self.convolutions(middle(pictures, CROP))
        return normalize(self.of_pictures(maps.mean((2, 3))), dim=-1)

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[…, 256]``, of words' numbers, ``[…, L]``, padded with 0."""
        found = self.of_sentences(self.words(sentences.flatten(0, -2)))
        return normalize(found, dim=-1).unflatten(0, sentences.shape[:-1])


def pixels(pictures: Iterable[Image.Image]) -> Tensor:
    """Return pictures resized without regard to their shape, uint8 ``[N, 32, 32, 3]``."""
    resized = (one.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in pictures)
    return torch.from_numpy(np.stack([np.asarray(one) for one in resized]))


def middle(pictures: Tensor, size: int) -> Tensor:
    """Return the middle of pictures as numbers from −1 to 1, ``[N, 3, size, size]``."""
    top, left = ((side - size) // 2 for side in pictures.shape[1:3])
    return pictures[:, top : top + size, left : left + size].permute(0, 3, 1, 2).float() / 127.5 - 1


def convolutions(channels: Sequence[int]) -> nn.Sequential:
    """Return convolutions, each of which halves the pictures' sides."""
    layers = (
        nn.Sequential(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        )
        for before, after in itertools.pairwise((3, *channels))
    )
    return nn.Sequential(*layers)


def projection(width: int) -> nn.Sequential:
    """Return a map of standardised features into the common space."""
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, WIDTH))
