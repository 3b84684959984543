"""A second caption and a teacher's features with the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankloss_open_clip.companions import Companion, SecondCaption, joined
from rankloss_open_clip.reference_features import ReferenceFeatures

_SEPARATOR = "\x1e"  # ASCII's record separator, which no caption contains


class TwoCompanions(Companion):
    """A second caption, and behind its tokens a teacher's features of the first one and the image.

    Args:
        caption: The second caption.
        features: The features.
    """

    def __init__(self, caption: SecondCaption, features: ReferenceFeatures) -> None:
        self.caption = caption
        self.features = features
        self.name = f"{caption.name} and a {features.name}"

    def of_rows(self, path: str, separator: str, dataset: Any) -> Sequence[str]:
        """See :class:`Companion`."""
        parts = (part.of_rows(path, separator, dataset) for part in (self.caption, self.features))
        return [joined(a, b, _SEPARATOR) for a, b in zip(*parts, strict=True)]

    def of_sample(self, sample: dict[str, Any], caption: str | None) -> str | None:
        """See :class:`Companion`."""
        second = self.caption.of_sample(sample, caption)
        row = None if second is None else self.features.of_sample(sample, caption)
        return None if second is None or row is None else joined(second, row, _SEPARATOR)

    def encode(self, tokenize: Callable[[list[str]], Tensor], companions: list[str]) -> Tensor:
        """See :class:`Companion`."""
        captions, rows = (list(x) for x in zip(*(x.split(_SEPARATOR) for x in companions), strict=True))
        parts = self.caption.encode(tokenize, captions), self.features.encode(tokenize, rows)
        return torch.cat(parts, dim=1)

    def texts(self, tokens: Tensor, companions: Tensor) -> Tensor:
        """See :class:`SecondCaption`."""
        return self.caption.texts(tokens, companions[:, : self.context])

    def merge(self, output: dict[str, Any], companions: Tensor) -> dict[str, Any]:
        """The features of both captions, and the teacher's."""
        captions, features = companions.tensor_split([self.context], dim=1)
        return self.features.merge(self.caption.merge(output, captions), features.contiguous())
