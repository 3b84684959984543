"""A teacher's precomputed features as members of a webdataset's samples, as a companion of each caption.

The workers that load the data read them. They travel as the bits of float32 numbers, and come out of the
model beside the student's features, as ``reference_image_features`` and ``reference_text_features``.
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
from rankloss_features.data import named_sample
from rankloss_features.folder import NAMES, Array
from rankloss_open_clip.companions import Companion, Sample

IN_SAMPLES = {"samples": NAMES, "samples:image": NAMES[:1], "samples:text": NAMES[1:]}
"""The values that mean members of a webdataset's samples, and which members."""

_logger = logging.getLogger("rankloss_open_clip")


class SampleFeatures(Companion):
    """A teacher's features of the image, the text, or both.

    The shorter of two in a sample, and those narrower than a text's tokens, end with zeros, which change no
    similarity within a modality.

    Args:
        where: One of :data:`IN_SAMPLES`.
        two_widths: Images and texts may have features of different width, which only the in-modal lists can
            be ranked by.
    """

    def __init__(self, where: str, *, two_widths: bool = False) -> None:
        self.two_widths, self.names = two_widths, IN_SAMPLES[where]
        self.members = [f"{name}.npy" for name in self.names]
        self.name = f"set of {' and '.join(self.members)}"
        self._widths: list[int] = []  # of the first sample
        self._damaged = 0

    def of_rows(self, path: str, separator: str, dataset: Any) -> Any:  # noqa: ARG002
        """An error: a CSV file has no members.

        Raises:
            ValueError: In any case.
        """
        raise ValueError(f"{path} is a CSV file, and has no {self.name}: give a folder of features")

    def of_sample(self, sample: Sample, caption: str) -> str | None:  # noqa: ARG002
        """The members of the sample, which are taken out of it."""
        if not all(member in sample for member in self.members):
            return None
        try:
            # Taken out, or the trainer would decode them for nothing.
            rows = [_vector(member, sample.pop(member)) for member in self.members]
            widths = [len(row) for row in rows]
            self._widths = self._widths or widths
            if widths != self._widths:
                named = " and ".join(self.members)
                raise ValueError(f"{named} have widths of {widths}, others of {self._widths}")
        except Exception as error:  # NumPy raises many of a damaged array
            self._damaged += 1
            _logger.warning(
                "%s skipped, damaged one number %d: %s", named_sample(sample), self._damaged, error
            )
            return None
        if len(set(widths)) > 1 and not self.two_widths:
            raise ValueError(
                f"image_features and text_features in {named_sample(sample)} must have one width to be "
                f"compared with each other, got {widths[0]} and {widths[1]}; features of two encoders rank "
                "the in-modal lists alone: lambda_cross=0, on the command line --rankclip-lambda-cross 0"
            )
        return _packed(rows)

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:  # noqa: ARG002
        """The bits of the numbers, two to an integer."""
        return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(x), np.int64) for x in texts]))

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        features = encoded.view(torch.float32).unflatten(1, (-1, len(self.names))).unbind(-1)
        named = zip(self.names, features, strict=True)
        return {**output, **{f"reference_{name}": x.contiguous() for name, x in named}}


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
            raise ValueError(
                f"{named_sample(sample)} has {' and '.join(found)}, a teacher's features: {remedy}"
            )
        yield sample


def _packed(rows: list[Array]) -> str:
    """Rows side by side, ``[width, rows]``, as the text of their bits."""
    width = max(map(len, rows))
    packed = np.zeros((width + width * len(rows) % 2, len(rows)), np.float32)
    for i, row in enumerate(rows):
        packed[: len(row), i] = row
    return base64.b64encode(packed.tobytes()).decode()


def _vector(member: str, written: bytes) -> Array:
    """The float32 numbers of a member of a sample.

    Raises:
        ValueError: They are no vector of a teacher. NumPy and torch raise other errors of other bytes.
    """
    array = np.lib.format.read_array(io.BytesIO(written), allow_pickle=False)
    row = torch.from_numpy(array).float()
    check_teacher(member, row[None], first_look=False)
    return row.numpy()
