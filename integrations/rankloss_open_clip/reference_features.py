"""A teacher's precomputed features of each pair, as a companion of its caption.

The workers that load the data read them, from a folder or from the samples themselves. They travel as the
bits of float32 numbers, and come out of the model beside the student's features, as
``reference_image_features`` and ``reference_text_features``. Rows of a folder are found by their pairs.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloss.checks import check_teacher
from rankloss_features import Features
from rankloss_features.data import row_of_sample
from rankloss_features.folder import NAMES, Array
from rankloss_open_clip.companions import Companion, Sample

IN_SAMPLES = {"samples": NAMES, "samples:image": NAMES[:1], "samples:text": NAMES[1:]}
"""The values that mean members of a webdataset's samples, and which members."""

_logger = logging.getLogger("rankloss_open_clip")


class ReferenceFeatures(Companion):
    """A teacher's features of the image, the text, or both.

    The shorter of two in a sample, and those narrower than a text's tokens, end with zeros, which change no
    similarity within a modality.

    Args:
        where: A folder of ``rankloss features``, or one of :data:`IN_SAMPLES`.
        two_widths: Images and texts may have features of different width, which only the in-modal lists can
            be ranked by.

    Raises:
        ValueError: As :class:`rankloss_features.Features`.
    """

    def __init__(self, where: str, *, two_widths: bool = False) -> None:
        self.two_widths = two_widths
        self.folder = None if where in IN_SAMPLES else Features(where)
        arrays = {} if self.folder is None else self.folder.arrays
        self.names = IN_SAMPLES[where] if self.folder is None else tuple(arrays)
        self._of_folder = {name: array.shape[1] for name, array in arrays.items()}  # its widths
        self.name = f"set of {' and '.join(f'{name}.npy' for name in self.names)}"
        self._widths: list[int] = []  # of the first sample
        self._damaged = 0

    def check(self) -> None:
        """Read all rows of a folder once; see :meth:`rankloss_features.Features.check`."""
        if self.folder is not None:
            self.folder.check()

    def _check_widths(self, widths: list[int], where: str) -> None:
        if len(set(widths)) > 1 and not self.two_widths:
            raise ValueError(
                f"image_features and text_features in {where} must have one width to be compared with each "
                f"other, got {widths[0]} and {widths[1]}; features of two encoders rank the in-modal lists "
                "alone: lambda_cross=0, on the command line --rankclip-lambda-cross 0"
            )

    def of_rows(self, path: str, separator: str, dataset: Any) -> Callable[[int], str]:  # noqa: ARG002
        """The rows of the folder, once every pair is compared with the folder's."""
        if self.folder is None:
            raise ValueError(f"{path} is a CSV file, and has no {self.name}: give a folder of features")
        self.folder.compare_columns(dataset.captions, dataset.images, path)
        return self._of_row

    def of_sample(self, sample: Sample, caption: str) -> str | None:
        """The row of the sample, or its members, which are taken out of the sample."""
        if self.folder is None:
            return self._members(sample)
        row = row_of_sample(self.folder, sample, caption)
        return None if row is None else self._of_row(row)

    def _of_row(self, row: int) -> str:
        assert self.folder is not None
        return _packed([array[0] for array in self.folder.take(np.array([row])).values()])

    def _members(self, sample: Sample) -> str | None:
        members = [f"{name}.npy" for name in self.names]
        if not all(member in sample for member in members):
            return None
        try:
            # Taken out, or the trainer would decode them for nothing.
            rows = [_vector(member, sample.pop(member)) for member in members]
            widths = [len(row) for row in rows]
            self._widths = self._widths or widths
            if widths != self._widths:
                raise ValueError(f"{' and '.join(members)} have widths of {widths}, others of {self._widths}")
        except Exception as error:  # NumPy raises many of a damaged array
            self._damaged += 1
            _logger.warning("%s skipped, damaged one number %d: %s", _named(sample), self._damaged, error)
            return None
        self._check_widths(widths, _named(sample))
        return _packed(rows)

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:  # noqa: ARG002
        """The bits of the numbers, two to an integer."""
        return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(x), np.int64) for x in texts]))

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        features = encoded.view(torch.float32).unflatten(1, (-1, len(self.names))).unbind(-1)
        named = dict(zip(self.names, features, strict=True))
        for name, width in self._of_folder.items():
            named[name] = named[name][:, :width]
        return {**output, **{f"reference_{name}": x.contiguous() for name, x in named.items()}}


def without_features(
    read: Callable[..., Iterable[Sample]], remedy: str, /, *args: Any, **kwargs: Any
) -> Iterator[Sample]:
    """Read webdataset samples as the trainer does, in a run that does not use a teacher's features.

    Args:
        read: The trainer's reader.
        remedy: The options that say whether to use them.
        *args: Arguments of the reader.
        **kwargs: The same, by name.

    Raises:
        ValueError: A sample has such features.
    """
    for sample in read(*args, **kwargs):
        found = [f"{name}.npy" for name in NAMES if f"{name}.npy" in sample]
        if found:
            raise ValueError(f"{_named(sample)} has {' and '.join(found)}, a teacher's features: {remedy}")
        yield sample


def _packed(rows: list[Array]) -> str:
    """Rows side by side, ``[width, rows]``, as the text of their bits."""
    width = max(map(len, rows))
    packed = np.zeros((width + width * len(rows) % 2, len(rows)), np.float32)
    for i, row in enumerate(rows):
        packed[: len(row), i] = row
    return base64.b64encode(packed.tobytes()).decode()


def _named(sample: Sample) -> str:
    return f"sample {sample.get('__key__')!r} of {sample.get('__url__')}"


def _vector(member: str, written: bytes) -> Array:
    """The float32 numbers of a member of a sample.

    Raises:
        ValueError: They are no vector of a teacher. NumPy raises other errors of bytes that are no array.
    """
    array = np.lib.format.read_array(io.BytesIO(written), allow_pickle=False)
    if array.dtype.kind != "f" or array.ndim != 1:
        raise ValueError(f"{member} must be a vector of floating numbers; got {array.dtype} {array.shape}")
    row = torch.from_numpy(array).float()
    check_teacher(member, row[None], first_look=False)
    return row.numpy()
