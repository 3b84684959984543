"""A teacher's precomputed features of each pair, as a companion of its caption.

They are read by the workers that load the data, travel as the bits of float32 numbers behind the tokens, and
come out of the model beside the student's features, as ``reference_image_features`` and
``reference_text_features``. A folder's rows are found by the pairs that they are of.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rankloss.checks import check_teacher
from rankloss_features.data import IMAGES
from rankloss_features.folder import NAMES, hash_of_pair, name_of, opened
from rankloss_open_clip.companions import Companion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

IN_SAMPLES = {"samples": NAMES, "samples:image": NAMES[:1], "samples:text": NAMES[1:]}
"""The values that mean members of a webdataset's samples, and which members."""

_BLOCK = 65_536  # pairs that are hashed together


def refuse(where: str, *, two_widths: bool) -> str | None:
    """Why features from there cannot be used, or None. All rows of a folder are read once."""
    if where in IN_SAMPLES:
        return None
    opened.cache_clear()  # of an earlier run in this process
    try:
        ReferenceFeatures(where, two_widths=two_widths)
        opened(where).check()
    except (OSError, ValueError) as error:
        return str(error)
    return None


class ReferenceFeatures(Companion):
    """A teacher's features of the image, the text, or both.

    Behind the tokens of a text are, for each of the features, the bits of its numbers in pairs. Features of
    an odd width, and the shorter of two, end with zeros, which change no similarity within a modality.

    Args:
        where: A folder of ``rankloss features``, or one of :data:`IN_SAMPLES`.
        two_widths: Whether images and texts may have features of different width, which only the in-modal
            lists can be ranked by.

    Raises:
        ValueError: As :class:`rankloss_features.Features`, or the widths differ.
    """

    name = "row of precomputed features"

    def __init__(self, where: str, *, two_widths: bool = False) -> None:
        self.where = where
        self.two_widths = two_widths
        self.in_samples = where in IN_SAMPLES
        if self.in_samples:
            self.names = IN_SAMPLES[where]
            self.name = f"set of {' and '.join(f'{name}.npy' for name in self.names)}"
        else:
            arrays = opened(where).arrays
            self.names = tuple(arrays)
            self._check_widths([array.shape[1] for array in arrays.values()], where)
        self._lengths: list[int] = []  # of the first sample's features

    def _check_widths(self, widths: list[int], where: str) -> None:
        if len(set(widths)) > 1 and not self.two_widths:
            raise ValueError(
                f"image_features and text_features in {where} must have one width to be compared with each "
                f"other, got {widths[0]} and {widths[1]}; features of two encoders rank the in-modal lists "
                "alone: lambda_cross=0, on the command line --rankclip-lambda-cross 0"
            )

    def of_rows(self, path: str, separator: str, dataset: Any) -> Sequence[str]:  # noqa: ARG002
        """The rows' own numbers, once every pair is compared with the folder's."""
        if self.in_samples:
            raise ValueError(
                f"{self.where} names members of a webdataset's samples, but {path} is a CSV file, whose rows "
                "need a folder of features"
            )
        captions, images = dataset.captions, dataset.images

        def pairs() -> Iterator[tuple[list[str], list[str]]]:
            for first in range(0, len(captions), _BLOCK):
                block = slice(first, first + _BLOCK)
                yield [str(x) for x in captions[block]], [name_of(x) for x in images[block]]

        opened(self.where).compare(pairs(), path)
        return [str(row) for row in range(len(captions))]

    def of_sample(self, sample: dict[str, Any], caption: str | None) -> str | None:
        """The row of the sample, or its members' numbers as text; these are taken out of the sample."""
        if self.in_samples:
            return self._members(sample)
        if caption is None or not any(name in sample for name in IMAGES):  # which the trainer skips
            return None
        row = opened(self.where).find(hash_of_pair(caption, sample["__key__"]))
        if row is None:
            raise ValueError(
                f"sample {sample['__key__']!r} of {sample.get('__url__')} with caption {caption!r} has no "
                f"row in {self.where}: its features are of another caption, or of other data"
            )
        return str(row)

    def _members(self, sample: dict[str, Any]) -> str | None:
        members = [f"{name}.npy" for name in self.names]
        if not all(member in sample for member in members):
            return None
        # Taken out, or the trainer would decode them for nothing.
        arrays = [np.load(io.BytesIO(sample.pop(member))) for member in members]
        where = f"sample {sample.get('__key__')!r}"
        self._lengths = self._lengths or [array.size for array in arrays]
        if any(array.shape != (length,) for array, length in zip(arrays, self._lengths, strict=True)):
            raise ValueError(
                f"the features in the samples must be vectors of one length; got "
                f"{[array.shape for array in arrays]} in {where} and lengths of {self._lengths} before"
            )
        self._check_widths(self._lengths, where)
        rows = [_checked(array, f"{name} of {where}") for name, array in zip(self.names, arrays, strict=True)]
        return " ".join(base64.b64encode(row.tobytes()).decode() for row in rows)

    def encode(self, tokenize: Callable[[list[str]], Tensor], companions: list[str]) -> Tensor:  # noqa: ARG002
        """See :class:`Companion`."""
        return torch.from_numpy(np.stack([self._bits(text) for text in companions]))

    def _bits(self, text: str) -> np.ndarray[Any, Any]:
        """The numbers of one row of each of the features, two to an integer."""
        if self.in_samples:
            rows = [np.frombuffer(base64.b64decode(part), np.float32) for part in text.split(" ")]
        else:
            rows = [array[0] for array in opened(self.where).take(np.array([int(text)])).values()]
        width = max(map(len, rows))
        width += width % 2
        padded = np.zeros((len(rows), width), np.float32)  # with np.pad it takes four times as long
        for row, place in zip(rows, padded, strict=True):
            place[: len(row)] = row
        return padded.ravel().view(np.int64)

    def merge(self, output: dict[str, Any], companions: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        features = companions.view(torch.float32).unflatten(1, (len(self.names), -1))
        return {**output, **{f"reference_{name}": features[:, i] for i, name in enumerate(self.names)}}


def _checked(rows: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """A sample's features as the float32 numbers that reach the loss.

    Raises:
        ValueError: As :func:`rankloss.checks.check_teacher`.
    """
    if rows.dtype.kind != "f":
        raise ValueError(f"{where} must have floating-point features; got {rows.dtype}")
    with np.errstate(over="ignore"):  # infinity is what the check looks for
        rows = np.array(rows, np.float32)
    check_teacher(where, torch.from_numpy(np.atleast_2d(rows)), first_look=False)
    return rows
