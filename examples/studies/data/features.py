"""Features of two frozen encoders, computed once, in blocks that are kept beside the pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .flickr8k import SENTENCES_PER_PICTURE, FolderError, Photographs

CACHE = "features"  # the folder of the blocks
BLOCK = 500  # pictures
PICTURE_SIZE = 224


class Encoders(Protocol):
    """An encoder of pictures and one of sentences, neither of which is trained here."""

    name: str  # with all that the features depend on beside pictures and sentences

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return features, ``[N, D]``."""

    def sentences(self, sentences: Sequence[str]) -> np.ndarray:
        """Return features, ``[N, D']``."""


class FrozenEncoders:
    """EfficientNet-Lite0 (ImageNet, 1,280 dimensions) and all-MiniLM-L6-v2 (384), whole inside packages.

    Pictures are resized to 224 × 224 without regard to their shape, so that nothing of them is cut off.

    Raises:
        RuntimeError: If a package is missing.
    """

    name = "tf_efficientnet_lite0 224x224 and all-MiniLM-L6-v2"

    def __init__(self) -> None:
        try:
            from sentence_transformers import SentenceTransformer

            from rankloss_features import packages

            model, sentences = packages.efficientnet_lite0(), packages.all_minilm_l6_v2()
        except ImportError as error:
            raise RuntimeError(
                f"{error.name} is needed to compute features: pip install -e 'examples[studies]'"
            ) from error
        self._pictures = model.eval().to(memory_format=torch.channels_last)
        self._sentences = SentenceTransformer(str(sentences), device="cpu")

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return the pooled features, ``[N, 1280]``."""
        size = (PICTURE_SIZE, PICTURE_SIZE)
        arrays = [np.asarray(one.resize(size, Image.Resampling.BICUBIC)) for one in pictures]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        # A few at a time stay within a processor's caches.
        return torch.cat([self._pictures(few) for few in pixels.split(8)]).numpy()

    def sentences(self, sentences: Sequence[str]) -> np.ndarray:
        """Return the unit-norm features, ``[N, 384]``."""
        return self._sentences.encode(list(sentences), batch_size=128, show_progress_bar=False)


@dataclasses.dataclass(frozen=True)
class Side:
    """The features of a split's pictures, in the split's order, and of their sentences, five for each."""

    pictures: Tensor  # [N, D]
    sentences: Tensor  # [N, 5, D']


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays into a file, which is there once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    np.savez(partial, **arrays)
    partial.replace(path)


class Cache:
    """The blocks in a folder, each named by the hash of all that its features depend on."""

    def __init__(self, photographs: Photographs, encoders: str) -> None:
        self.photographs, self.encoders = photographs, encoders

    def blocks(self, names: Sequence[str]) -> dict[Path, Sequence[str]]:
        """Return the blocks of these pictures with their file names.

        Raises:
            FolderError: If a picture is missing.
        """
        parts = [names[start : start + BLOCK] for start in range(0, len(names), BLOCK)]
        return {self.photographs.folder / CACHE / f"{self._hash(part)}.npz": part for part in parts}

    def _hash(self, names: Sequence[str]) -> str:
        found = hashlib.sha256(self.encoders.encode())
        for name in names:
            found.update(hashlib.sha256(self.photographs.path(name).read_bytes()).digest())
            found.update("\n".join([name, *self.photographs.sentences[name]]).encode())
        return found.hexdigest()[:16]

    def fill(self, path: Path, names: Sequence[str], encoders: Encoders) -> None:
        """Compute a block and write it.

        Raises:
            FolderError: If a picture cannot be read; it names the first.
        """
        pictures = encoders.pictures([_opened(self.photographs.path(name)) for name in names])
        sentences = encoders.sentences([text for name in names for text in self.photographs.sentences[name]])
        save(path, pictures=pictures, sentences=sentences)

    def side(self, names: Sequence[str]) -> Side:
        """Return the features of these pictures, whose blocks are there."""
        found = [np.load(path) for path in self.blocks(names)]
        pictures, sentences = (
            torch.from_numpy(np.concatenate([block[kind] for block in found]))
            for kind in ("pictures", "sentences")
        )
        return Side(pictures, sentences.unflatten(0, (-1, SENTENCES_PER_PICTURE)))


def cached(photographs: Photographs, train_pictures: int, kind: type[Encoders] = FrozenEncoders) -> Cache:
    """Return the features of the pictures that are used; those that are missing are computed."""
    cache = Cache(photographs, kind.name)
    blocks = [
        block for names in photographs.used(train_pictures).values() for block in cache.blocks(names).items()
    ]
    missing = [(path, names) for path, names in blocks if not path.is_file()]
    encoders = kind() if missing else None
    for path, names in tqdm(missing, f"{kind.name}: blocks of {BLOCK} pictures", disable=not missing):
        cache.fill(path, names, encoders)
    return cache


def standardised(sides: Mapping[str, Side]) -> dict[str, Side]:
    """Return the sides with pictures' features of mean 0 and standard deviation 1 on the train side."""
    std, mean = torch.std_mean(sides["train"].pictures, dim=0)
    return {
        name: Side((side.pictures - mean) / std.clamp(min=1e-6), side.sentences)
        for name, side in sides.items()
    }


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise FolderError(path, f"damaged: {error}") from error
