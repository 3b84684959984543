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

from rankloss_open_clip.companions import Companion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NAMES = ("image_features", "text_features")
"""The arrays of a file, and with ``.npy`` behind them the members of a sample."""

IN_SAMPLES = {"samples": NAMES, "samples:image": NAMES[:1], "samples:text": NAMES[1:]}
"""The values that mean members of a webdataset's samples, and which members."""


def refuse(where: str, args: Any) -> str | None:
    """Why features from there cannot be used with the trainer's arguments, or None."""
    kind = getattr(args, "dataset_type", None)
    if kind == "auto":
        kind = {"tar": "webdataset", "csv": "csv", "tsv": "csv"}.get(str(args.train_data).split(".")[-1])
    if where in IN_SAMPLES and kind == "csv":
        return f"{where} names members of a webdataset's samples; rows of a CSV file need a file of features"
    if where not in IN_SAMPLES:
        if kind == "webdataset":
            return (
                f"{where} is read by row number, which a webdataset's samples do not have; put the features "
                f"into the samples and give one of {', '.join(IN_SAMPLES)}"
            )
        opened.cache_clear()  # of an earlier run in this process
        try:
            opened(where)
        except (OSError, ValueError) as error:
            return str(error)
    return None


@functools.lru_cache(maxsize=1)
def opened(path: str) -> Mapping[str, np.ndarray[Any, Any]]:
    """The arrays of a directory, mapped into memory, or those of an ``.npz`` file, read into it.

    Raises:
        ValueError: There are none, or they are not matrices of floating-point numbers of one shape.
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
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"image_features and text_features in {path} must have one shape (columns of zeros change no "
            f"similarity); got {' and '.join(str(array.shape) for array in arrays.values())}"
        )
    return arrays


class ReferenceFeatures(Companion):
    """A teacher's features of the image, the text, or both.

    The integers of a text are its tokens and after them, for each of the features, the bits of its numbers in
    pairs: ``[n, 1, context + width]``.

    Args:
        where: A path that :func:`opened` takes, or one of :data:`IN_SAMPLES`.
    """

    name = "row of precomputed features"

    def __init__(self, where: str) -> None:
        self.where = where
        self.in_samples = where in IN_SAMPLES
        self.names = IN_SAMPLES[where] if self.in_samples else tuple(opened(where))
        self.context: int | None = None
        self._shape: tuple[int, ...] | None = None
        if self.in_samples:
            self.name = f"set of {' and '.join(f'{name}.npy' for name in self.names)}"

    def of_rows(self, path: str, separator: str, count: int) -> Sequence[str]:  # noqa: ARG002
        """The rows' own numbers."""
        if self.in_samples:
            raise ValueError(
                f"{self.where} names members of a webdataset's samples, but {path} is a CSV file"
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
            raise ValueError(f"{self.where} has rows of a CSV file, but the samples come from a webdataset")
        members = [f"{name}.npy" for name in self.names]
        if not all(member in sample for member in members):
            return None
        # Taken out, or the trainer would decode them for nothing.
        arrays = [np.load(io.BytesIO(sample.pop(member))) for member in members]
        shapes = [array.shape for array in arrays]
        self._shape = shapes[0] if self._shape is None else self._shape
        if len(self._shape) != 1 or any(shape != self._shape for shape in shapes):
            raise ValueError(
                f"the features in the samples must be vectors of one length; got {shapes} in "
                f"{sample.get('__key__')!r} and {self._shape} before"
            )
        features = _checked(np.stack(arrays), f"sample {sample.get('__key__')!r}")
        return base64.b64encode(features.tobytes()).decode()

    def prepare(self, tokenizer: Any) -> None:
        """The length of a tokenized text."""
        self.context = tokenizer([""]).shape[-1]

    def encode(self, tokenize: Callable[[list[str]], Tensor], pairs: list[tuple[str, str]]) -> Tensor:
        """See :class:`Companion`."""
        tokens = tokenize([caption for caption, _ in pairs]).long()
        bits = np.stack([_bits(self._features(text)) for _, text in pairs])
        return torch.cat([tokens, torch.from_numpy(bits)], dim=1)[:, None]

    def _features(self, text: str) -> np.ndarray[Any, Any]:
        """One row of each of the features."""
        if self.in_samples:
            return np.frombuffer(base64.b64decode(text), np.float32).reshape(len(self.names), -1)
        row = np.stack([array[int(text)] for array in opened(self.where).values()])
        return _checked(row, f"row {text} of {self.where}, counted from 0,")

    def take_off(self, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokens, and the features by the names that the loss has for them.

        Features of an odd length end with a zero, which changes no similarity.
        """
        tokens, bits = text[:, 0, : self.context], text[:, 0, self.context :]
        features = bits.contiguous().view(torch.float32).unflatten(1, (len(self.names), -1))
        return tokens.contiguous(), {f"reference_{x}": features[:, i] for i, x in enumerate(self.names)}


def _checked(features: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    if features.dtype.kind != "f":
        raise ValueError(f"{where} must have floating-point features; got {features.dtype}")
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"{where} has a feature that is not finite")
    return features


def _bits(features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Float32 numbers, two to an integer, ``[k, D]`` → ``[k·⌈D/2⌉]``."""
    even = np.pad(features, ((0, 0), (0, features.shape[1] % 2)))
    return np.ascontiguousarray(even).view(np.int64).ravel()
