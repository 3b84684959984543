"""Rows of a folder of a teacher's features, as they travel through open_clip's trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        self._file = ""  # the CSV file of the pairs
        self._images: Sequence[Any] = ()  # the paths of its pictures, by row; of a webdataset none
        # By the names that the loss has for the features.
        self._widths = {f"reference_{name}": array.shape[1] for name, array in folder.arrays.items()}

    def read_rows(self, path: str, separator: str, dataset: Any) -> Iterable[int]:  # noqa: ARG002
        """The numbers of the rows, once every pair is compared with the folder's, and some pictures.

        Raises:
            ValueError: A pair or a picture is not the folder's.
        """
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
        """Compare pictures with those that the teacher has read; the trainer names one that is not there."""
        if self.folder.pictures is None:
            return
        self.folder.compare_pictures(self._pictures_of(rows), self._file)

    def _pictures_of(self, rows: Iterable[int]) -> Iterator[tuple[int, str, bytes]]:
        """The row, the path and the content of each picture that is there."""
        for row in rows:
            path = str(self._images[row])
            if os.path.isfile(path):
                yield row, path, content_of(path)

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:  # noqa: ARG002
        """The features of the rows that the texts number, as integers ``[n, width]``.

        An integer has the bits of two features. So they pass unchanged through the trainer's data path, which
        is made for tokens.

        Raises:
            ValueError: The picture of a row has changed since the teacher has read it.
        """
        rows = np.array([int(text) for text in texts], np.int64)
        if len(self._images):  # of a webdataset each picture was compared when its sample was read
            self._compare_pictures(rows.tolist())
        of_images_and_texts = list(self.folder.take(rows).values())
        features = np.concatenate(of_images_and_texts, axis=1)  # [n, D], float32
        columns_to_add = features.shape[1] % 2  # an odd one out needs a second for its integer
        padded = np.pad(features, ((0, 0), (0, columns_to_add)))
        return torch.from_numpy(padded.view(np.int64))

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:  # noqa: ARG002
        """The texts, to which a row adds none."""
        return texts

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        widths = list(self._widths.values())
        padded = encoded.contiguous().view(torch.float32)  # as encode has packed them, two to an integer
        parts = padded[:, : sum(widths)].split(widths, dim=1)
        features = {name: part.contiguous() for name, part in zip(self._widths, parts, strict=True)}
        return {**output, **features}
