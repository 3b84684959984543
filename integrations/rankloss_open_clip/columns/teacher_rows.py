"""Rows of a folder of a teacher's features, as they travel through open_clip's trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloss_features.data import named_sample, some_rows
from rankloss_features.folder import Features, hash_of_pair, identity_of
from rankloss_features.opening import content_of


class RowColumn:
    """A teacher's features, whose rows' numbers travel with the captions through open_clip's trainer.

    A :class:`rankloss_open_clip.columns.text_columns.TextColumn`. Its text is the number of a row; the
    workers that load the data look the row up, and compare its picture with the teacher's.

    Args:
        folder: The folder of features.
    """

    name = "row of features"

    def __init__(self, folder: Features) -> None:
        self.folder = folder
        self._images: Sequence[Any] = ()  # the paths of a CSV file's pictures
        self._file = ""
        self._widths = {f"reference_{name}": x.shape[1] for name, x in folder.arrays.items()}

    def read_rows(self, path: str, separator: str, dataset: Any) -> Iterable[int]:  # noqa: ARG002
        """The numbers of the rows, once every pair is compared with the folder's, and some pictures."""
        self.folder.compare_columns(dataset.captions, dataset.images, path)
        self._images, self._file = dataset.images, path
        self._compare_pictures(some_rows(len(self._images)))
        return range(len(self.folder))

    def read_sample(self, sample: Mapping[str, Any], caption: str, image: bytes) -> int:
        """The row of a webdataset sample.

        Raises:
            ValueError: The folder has no such pair.
        """
        row = self.folder.find(hash_of_pair(caption, identity_of(image)))
        if row is None:
            raise ValueError(
                f"{named_sample(sample)} with caption {caption!r} has no row in {self.folder.path}: its rows "
                "are of another picture or caption, or of other data"
            )
        return row

    def _compare_pictures(self, rows: Iterable[int]) -> None:
        """Compare pictures with those that the teacher has read; the trainer names what is not there."""
        if self.folder.pictures is None:
            return
        named = ((row, str(self._images[row])) for row in rows)
        read = ((row, path, content_of(path)) for row, path in named if os.path.isfile(path))
        self.folder.compare_pictures(read, self._file)

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:  # noqa: ARG002
        """The bits of each row's numbers, two to an integer.

        Raises:
            ValueError: The picture of a row has changed since the teacher has read it.
        """
        rows = np.array(texts, np.int64)
        if len(self._images):
            self._compare_pictures(rows.tolist())
        numbers = np.concatenate([*self.folder.take(rows).values()], axis=1)
        return torch.from_numpy(np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2))).view(np.int64))

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:  # noqa: ARG002
        """The texts, to which a row adds none."""
        return texts

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        widths = [*self._widths.values()]
        features = encoded.contiguous().view(torch.float32)[:, : sum(widths)].split(widths, dim=1)
        return {**output, **{name: x.contiguous() for name, x in zip(self._widths, features, strict=True)}}
