"""A second caption of each image, as a companion of the first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankloss_open_clip.companions import Companion, as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class SecondCaption(Companion):
    """A second caption, whose features become ``caption_features`` of the model's output.

    Both captions are tokenized alike, ``[n, 2, context]``, and encoded in one call.

    Args:
        key: A column of a CSV file; in a webdataset the extension of a text file, or ``json:FIELD``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.name = f"second caption {key!r}"

    def of_rows(self, path: str, separator: str, count: int) -> Sequence[str]:  # noqa: ARG002
        """See :class:`Companion`."""
        import pandas  # type: ignore[import-untyped]

        columns = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
        if self.key not in columns:
            raise ValueError(
                f"{path} has no column {self.key!r} for the second caption; it has {', '.join(columns)}"
            )
        second = pandas.read_csv(path, sep=separator, usecols=[self.key])[self.key]
        empty = second.isna()
        if empty.any():
            raise ValueError(
                f"{path} has no second caption in {int(empty.sum())} rows: column {self.key!r} is empty, "
                f"first in row {int(empty.argmax()) + 1}"
            )
        captions: list[str] = second.tolist()
        return captions

    def of_sample(self, sample: dict[str, Any]) -> str | None:
        """See :class:`Companion`."""
        kind, _, name = self.key.partition(":")
        if kind != "json" or not name:
            second = sample.get(self.key.lower())
        else:
            try:
                second = json.loads(sample["json"])[name]
            except (KeyError, TypeError, ValueError):
                second = None
        return None if second is None else as_text(second)

    def encode(self, tokenize: Callable[[list[str]], Tensor], pairs: list[tuple[str, str]]) -> Tensor:
        """See :class:`Companion`."""
        return tokenize([caption for pair in pairs for caption in pair]).view(len(pairs), 2, -1)

    def take_off(self, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The first captions, then the second ones."""
        return text.transpose(0, 1).flatten(0, 1), {}

    def share_out(self, output: dict[str, Any], taken: dict[str, Tensor]) -> dict[str, Any]:  # noqa: ARG002
        """The features of both captions, apart."""
        first, second = output["text_features"].chunk(2)
        return {**output, "text_features": first, "caption_features": second}
