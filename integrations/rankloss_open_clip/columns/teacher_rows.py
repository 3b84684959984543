"""Rows of a folder of a teacher's features, as they travel through open_clip's trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloss_features.data import named_sample
from rankloss_features.folder import Features, hash_of_pair


class RowColumn:
    """A teacher's features, whose rows' numbers travel with the captions through open_clip's trainer.

    A :class:`rankloss_open_clip.columns.text_columns.TextColumn`. Its text is the number of a row; the
    workers that load the data look the row up.

    Args:
        folder: The folder of features.
    """

    name = "row of features"

    def __init__(self, folder: Features) -> None:
        self.folder = folder
        self._widths = {f"reference_{name}": x.shape[1] for name, x in folder.arrays.items()}

    def read_rows(self, path: str, separator: str, dataset: Any) -> Iterable[int]:  # noqa: ARG002
        """The numbers of the rows, once every pair is compared with the folder's."""
        self.folder.compare_columns(dataset.captions, dataset.images, path)
        return range(len(self.folder))

    def read_sample(self, sample: Mapping[str, Any], caption: str) -> int:
        """The row of a webdataset sample.

        Raises:
            ValueError: The folder has no such pair.
        """
        row = self.folder.find(hash_of_pair(caption, sample["__key__"]))
        if row is None:
            raise ValueError(
                f"{named_sample(sample)} with caption {caption!r} has no row in {self.folder.path}: its rows "
                "are of another caption, or of other data"
            )
        return row

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:  # noqa: ARG002
        """The bits of each row's numbers, two to an integer."""
        numbers = np.concatenate([*self.folder.take(np.array(texts, np.int64)).values()], axis=1)
        return torch.from_numpy(np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2))).view(np.int64))

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:  # noqa: ARG002
        """The texts, to which a row adds none."""
        return texts

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        widths = [*self._widths.values()]
        features = encoded.contiguous().view(torch.float32)[:, : sum(widths)].split(widths, dim=1)
        return {**output, **{name: x.contiguous() for name, x in zip(self._widths, features, strict=True)}}
