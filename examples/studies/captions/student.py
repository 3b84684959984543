"""The student: a few convolutions, the mean of word vectors, and one space."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

SIZE, CROP = 32, 28  # pixels of a picture's side, and those of them that are seen
WIDTH = 256  # of the common space
_CHANNELS = (16, 32, 64, 128)
_WORDS = 128
_SCALE = 1 / 0.07


class Student(nn.Module):
    """Two towers that learn from scratch, and the scale of the similarities.

    Args:
        words: Numbers of words.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        channels = zip((3, *_CHANNELS), _CHANNELS, strict=False)
        self.convolutions = nn.Sequential(*(_convolution(*of) for of in channels))
        self.words = nn.EmbeddingBag(words, _WORDS, mode="mean", padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.1)
        self.of_pictures, self.of_sentences = _projection(_CHANNELS[-1]), _projection(_WORDS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.to(memory_format=torch.channels_last)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, 256]``, of the middle of pictures, uint8 ``[N, H, W, 3]``."""
        edge = (pictures.shape[1] - CROP) // 2
        middle = pictures[:, edge : edge + CROP, edge : edge + CROP].permute(0, 3, 1, 2)
        maps = self.convolutions(middle.float() / 127.5 - 1)
        return normalize(self.of_pictures(maps.mean((2, 3))), dim=-1)

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[…, 256]``, of words' numbers, ``[…, L]``, padded with 0."""
        found = self.of_sentences(self.words(sentences.flatten(0, -2)))
        return normalize(found, dim=-1).unflatten(0, sentences.shape[:-1])


def _convolution(channels: int, more: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, more, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(more), nn.ReLU(inplace=True))


def _projection(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, WIDTH))


def pixels(pictures: Iterable[Image.Image]) -> Tensor:
    """Return pictures resized without regard to their shape, uint8 ``[N, 32, 32, 3]``."""
    resized = (one.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in pictures)
    return torch.from_numpy(np.stack([np.asarray(one) for one in resized]))


def crops(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random crop of each picture, ``[N, 28, 28, 3]``, every second one mirrored on average."""
    n = len(pictures)
    corners = [torch.randint(s - CROP + 1, (n, 1), generator=generator) for s in pictures.shape[1:3]]
    rows, columns = (corner + torch.arange(CROP) for corner in corners)
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pictures[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
