"""A teacher's precomputed features of each pair, as a companion of its caption.

They are read by the workers that load the data, travel as the bits of float32 numbers behind the tokens, and
come out of the model beside the student's features, as ``reference_image_features`` and
``reference_text_features``.
"""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rankloss.checks import check_teacher
from rankloss_open_clip.companions import Companion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NAMES = ("image_features", "text_features")
"""The arrays of a file, and with ``.npy`` behind them the members of a sample."""

IN_SAMPLES = {"samples": NAMES, "samples:image": NAMES[:1], "samples:text": NAMES[1:]}
"""The values that mean members of a webdataset's samples, and which members."""


_ROWS = 65_536  # that are looked at together


def refuse(where: str, *, two_widths: bool) -> str | None:
    """Why features from there cannot be used, or None. All rows of a file are read once."""
    if where in IN_SAMPLES:
        return None
    opened.cache_clear()  # of an earlier run in this process
    try:
        ReferenceFeatures(where, two_widths=two_widths)
        for name, array in opened(where).items():
            first = 0
            for rows in np.array_split(array, max(1, len(array) // _ROWS)):
                _checked(rows, f"{name} in {where}, counted from row {first},")
                first += len(rows)
    except (OSError, ValueError) as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def opened(path: str) -> Mapping[str, np.ndarray[Any, Any]]:
    """The arrays of a directory, mapped into memory, or those of an ``.npz`` file, read into it.

    Raises:
        ValueError: There are none, or they are not matrices of floating-point numbers with as many rows.
        OSError: They cannot be read.
    """
    if Path(path).is_dir():
        files = {name: Path(path, f"{name}.npy") for name in NAMES}
        arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items() if file.exists()}
        shown = ", ".join(sorted(x.name for x in Path(path).iterdir())) or "nothing"
    elif path.endswith(".npz"):
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in NAMES if name in stored.files}
            shown = ", ".join(stored.files)
    else:
        raise ValueError(f"{path} is neither a directory nor an .npz file")
    if not arrays:
        raise ValueError(f"{path} has neither image_features nor text_features; it has {shown}")
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
            raise ValueError(
                f"{name} in {path} must be a matrix of floating-point numbers, a row per pair; got "
                f"{array.dtype} {array.shape}"
            )
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(
            f"image_features and text_features in {path} must have a row per pair each; got "
            f"{' and '.join(str(array.shape) for array in arrays.values())}"
        )
    return arrays


class ReferenceFeatures(Companion):
    """A teacher's features of the image, the text, or both.

    Behind the tokens of a text are, for each of the features, the bits of its numbers in pairs. Features of
    an odd width, and the shorter of two, end with zeros, which change no similarity within a modality.

    Args:
        where: A path that :func:`opened` takes, or one of :data:`IN_SAMPLES`.
        two_widths: Whether images and texts may have features of different width, which only the in-modal
            lists can be ranked by.

    Raises:
        ValueError: As :func:`opened`, or the widths differ.
        OSError: As :func:`opened`.
    """

    name = "row of precomputed features"

    def __init__(self, where: str, *, two_widths: bool = False) -> None:
        self.where = where
        self.two_widths = two_widths
        self.in_samples = where in IN_SAMPLES
        if self.in_samples:
            self.names = IN_SAMPLES[where]
        else:
            arrays = opened(where)
            self.names = tuple(arrays)
            self._check_widths([array.shape[1] for array in arrays.values()], where)
        self._lengths: list[int] = []  # of the first sample's features
        if self.in_samples:
            self.name = f"set of {' and '.join(f'{name}.npy' for name in self.names)}"

    def _check_widths(self, widths: list[int], where: str) -> None:
        if len(set(widths)) > 1 and not self.two_widths:
            raise ValueError(
                f"image_features and text_features in {where} must have one width to be compared with each "
                f"other, got {widths[0]} and {widths[1]}; features of two encoders rank the in-modal lists "
                "alone: lambda_cross=0, on the command line --rankclip-lambda-cross 0"
            )

    def of_rows(self, path: str, separator: str, count: int) -> Sequence[str]:  # noqa: ARG002
        """The rows' own numbers."""
        if self.in_samples:
            raise ValueError(
                f"{self.where} names members of a webdataset's samples, but {path} is a CSV file, whose rows "
                "need a file of features"
            )
        rows = len(next(iter(opened(self.where).values())))
        if rows != count:
            raise ValueError(
                f"{self.where} must have a row of features per row of {path}, which has {count}; got {rows}"
            )
        return [str(row) for row in range(count)]

    def of_sample(self, sample: dict[str, Any]) -> str | None:
        """The members' numbers as text; they are taken out of the sample."""
        if not self.in_samples:
            raise ValueError(
                f"{self.where} is read by row number, which a webdataset's samples do not have; put the "
                f"features into the samples and give one of {', '.join(IN_SAMPLES)}"
            )
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
            rows = [array[int(text)].astype(np.float32) for array in opened(self.where).values()]
        width = max(map(len, rows))
        width += width % 2
        return np.concatenate([np.pad(row, (0, width - len(row))) for row in rows]).view(np.int64)

    def merge(self, output: dict[str, Any], companions: Tensor) -> dict[str, Any]:
        """The output and the features, by the names that the loss has for them."""
        features = companions.view(torch.float32).unflatten(1, (len(self.names), -1))
        return {**output, **{f"reference_{name}": features[:, i] for i, name in enumerate(self.names)}}


def _checked(rows: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """The rows, or one of them, as the float32 numbers that reach the loss.

    Raises:
        ValueError: As :func:`rankloss.checks.check_teacher`.
    """
    if rows.dtype.kind != "f":
        raise ValueError(f"{where} must have floating-point features; got {rows.dtype}")
    with np.errstate(over="ignore"):  # infinity is what the check looks for
        rows = np.array(rows, np.float32)
    check_teacher(where, torch.from_numpy(np.atleast_2d(rows)), first_look=False)
    return rows
