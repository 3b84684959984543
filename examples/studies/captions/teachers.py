"""The teachers: rows of the training pairs' captions or pictures, made once for all trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_array, vstack
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from studies.data.features import FrozenEncoders
from studies.data.words import WordVectors
from studies.training import kept

_LSA = 256  # dimensions
_THUMBNAIL = 8  # pixels of a side
_SHUFFLED, _CLIP = "shuffled ", "clip's "
_MOST = 50_000  # texts whose rows of all words are kept with their zeros
_PART = 4_096  # of more texts


class SparseRows:
    """Rows that are mostly zeros, read as those of a tensor ``[N, S, D]``.

    Args:
        rows: ``[N·S, D]``.
        each: S.
    """

    def __init__(self, rows: csr_array, each: int) -> None:
        self.rows, self.each = rows, each

    def __getitem__(self, places: tuple[Tensor, Tensor]) -> Tensor:
        """Return rows, ``[M, D]``, by their places along both axes."""
        first, second = places
        return torch.from_numpy(self.rows[(first * self.each + second).numpy()].toarray())

    def ordered(self, order: Tensor) -> SparseRows:
        """Return the rows in another order of the first axis."""
        places = order.unsqueeze(1) * self.each + torch.arange(self.each)
        return SparseRows(self.rows[places.flatten().numpy()], self.each)


class Teachers:
    """The unit rows of a training side, by the teacher's name.

    Args:
        captions: Of each picture as many.
        pixels: uint8 ``[N, H, W, 3]``.
        pictures: Returns the pictures as the frozen encoder is to see them.
        folder: Keeps the encoders' features.
        clip: Returns the rows of a CLIP of more pairs, "pictures" and "texts". None: there is none.
    """

    def __init__(
        self, captions: Sequence[Sequence[str]], pixels: Tensor,
        pictures: Callable[[], Sequence[Image.Image]], folder: Path,
        clip: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.texts = [text for of in captions for text in of]
        self.pixels, self.pictures, self.folder, self.clip = pixels, pictures, folder, clip
        self._made: dict[str, Tensor | SparseRows] = {}

    def rows(self, name: str) -> Any:
        """Return the rows of a name.

        Of texts, ``[N, S, D]``: "tf-idf", "lsa", "minilm"; two joined by +, whose cosines are the mean of
        both; "shuffled " before a name gives each picture the rows of another. Of pictures, ``[N, D]``:
        "thumbnails", "efficientnet". TF-IDF of many texts is a :class:`SparseRows`. "clip's texts" and
        "clip's pictures" are of one space.
        """
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Tensor | SparseRows:
        n = len(self.pixels)
        if name.startswith(_SHUFFLED):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
            rows = self.rows(name.removeprefix(_SHUFFLED))
            return rows.ordered(order) if isinstance(rows, SparseRows) else rows[order]
        if "+" in name:
            parts = [self.rows(one) for one in name.split("+")]
            return torch.cat(parts, dim=-1) / len(parts) ** 0.5
        if name == "thumbnails":
            small = avg_pool2d(self.pixels.permute(0, 3, 1, 2).float(), self.pixels.shape[1] // _THUMBNAIL)
            return normalize((small - small.mean(0)).flatten(1), dim=-1)
        if name.startswith(_CLIP):
            if self.clip is None:
                raise ValueError(f"{name}: no CLIP of more pairs is at hand for this data set")
            return kept(self.folder / "clip.pt", self.clip)[name.removeprefix(_CLIP)]
        if name in ("minilm", "efficientnet"):
            encode = self._minilm if name == "minilm" else self._efficientnet
            made = kept(self.folder / f"{name}.pt", lambda: {"rows": torch.from_numpy(encode())})["rows"]
            found = normalize(made, dim=-1)
            return found.unflatten(0, (n, -1)) if name == "minilm" else found
        vectors = WordVectors(self.texts, dimensions={"lsa": _LSA, "tf-idf": None}[name])
        if name == "tf-idf" and len(self.texts) > _MOST:
            starts = range(0, len(self.texts), _PART)
            parts = [csr_array(vectors.transform(self.texts[start : start + _PART])) for start in starts]
            return SparseRows(vstack(parts, format="csr"), len(self.texts) // n)
        return torch.from_numpy(vectors.transform(self.texts)).unflatten(0, (n, -1))

    def _minilm(self) -> np.ndarray:
        return FrozenEncoders().sentences(self.texts)

    def _efficientnet(self) -> np.ndarray:
        pictures, encoders = self.pictures(), FrozenEncoders()
        parts = (pictures[start : start + 64] for start in range(0, len(pictures), 64))
        return np.concatenate([encoders.pictures(part) for part in parts])
