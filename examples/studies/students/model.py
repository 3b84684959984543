"""The student: convolutions on pictures, a small transformer on words, and one space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

MAX_WORDS = 40  # of a caption; the others are left out
CROP = 56  # pixels of a picture's side that are seen
WIDTH = 256  # of the common space
_CHANNELS = (16, 32, 64, 128, 256)
_WORDS, _HEADS, _LAYERS = 128, 4, 2  # the transformer's width, its heads and layers
SCALE = 1 / 0.07  # of the similarities, at the start


class Student(nn.Module):
    """Two towers that learn from scratch, and the scale of the similarities.

    A tower's features are standardised over the batch before they are projected into the space: at first
    those of different pictures are almost the same.

    Args:
        words: Numbers of words.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.convolutions = convolutions(_CHANNELS)
        self.of_pictures = projection(_CHANNELS[-1])
        self.transformer = Transformer(words)
        self.of_sentences = projection(_WORDS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.to(memory_format=torch.channels_last)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, 256]``, of the middle of pictures, uint8 ``[N, H, W, 3]``."""
        maps = self.convolutions(middle(pictures, CROP))
        return normalize(self.of_pictures(maps.mean((2, 3))), dim=-1)

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[…, 256]``, of sentences, words' numbers ``[…, L]``."""
        found = self.transformer(sentences.flatten(0, -2))
        return normalize(self.of_sentences(found), dim=-1).unflatten(0, sentences.shape[:-1])


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


class Transformer(nn.Module):
    """A pre-norm transformer; a sentence's feature is the mean over its words.

    It starts as the mean of word vectors: the layers add nothing, and places do not count. Layers compute the
    words alone, one after another, and the padding in attention only.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, _WORDS)
        self.places = nn.Parameter(torch.zeros(MAX_WORDS, _WORDS))
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WORDS)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, sentences: Tensor) -> Tensor:
        """Return features, ``[N, 128]``, of words' numbers, ``[N, L]``, padded with 0."""
        lengths = (sentences > 0).sum(1)
        sentences = sentences[:, : int(lengths.max())]
        there = sentences > 0
        row, place = there.nonzero(as_tuple=True)
        x = self.words(sentences[there]) + self.places[place]
        for layer in self.layers:
            x = layer(x, there)
        total = x.new_zeros(len(sentences), _WORDS).index_add(0, row, self.norm(x))
        return total / lengths.unsqueeze(1)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_WORDS) for _ in range(2))
        self.attended, self.mixed = nn.Linear(_WORDS, 3 * _WORDS), nn.Linear(_WORDS, _WORDS)
        self.each = nn.Sequential(nn.Linear(_WORDS, 2 * _WORDS), nn.GELU(), nn.Linear(2 * _WORDS, _WORDS))
        for last in (self.mixed, self.each[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Return the next layer's words, ``[M, 128]``; ``there``, ``[N, L]``, has the M words' places."""
        first, second = self.norms
        padded = x.new_zeros(*there.shape, 3 * _WORDS)
        padded[there] = self.attended(first(x))
        q, k, v = padded.unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        x = x + self.mixed(seen.transpose(1, 2).flatten(2)[there])
        return x + self.each(second(x))
