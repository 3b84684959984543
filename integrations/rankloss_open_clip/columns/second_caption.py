"""A second caption of each image, as open_clip's trainer reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankloss_features.data import read_member
from rankloss_open_clip.columns.captions import text_of
from rankloss_open_clip.columns.csv_files import read_columns


class SecondCaption:
    """A second caption, whose features become ``caption_features`` of the model's output.

    A :class:`rankloss_open_clip.columns.text_columns.TextColumn` of the first caption. The model encodes both
    in one call.

    Args:
        caption_key: The source of the second caption: a column of a CSV file; in a webdataset the extension
            of a text file, or ``json:FIELD``.
    """

    def __init__(self, *, caption_key: str) -> None:
        self.key = caption_key
        self.name = f"second caption {caption_key!r}"

    def read_rows(self, path: str, separator: str, dataset: Any) -> Any:  # noqa: ARG002
        """The column of a CSV file.

        Raises:
            ValueError: The file has no such column, or a cell of it is empty or blank.
        """
        (column,) = read_columns(path, separator, self.key)
        is_blank = column.isna() | (column.astype(str).str.strip() == "")
        if is_blank.any():
            raise ValueError(
                f"{path} has no second caption in {int(is_blank.sum())} rows: column {self.key!r} is empty, "
                f"first in row {int(is_blank.argmax()) + 1}"
            )
        return column.tolist()

    def read_sample(self, sample: dict[str, Any], caption: str, image: bytes) -> Any:  # noqa: ARG002
        """A member of a webdataset sample, or a field of its JSON; None where it has none, or a blank one."""
        second = read_member(sample, self.key)
        is_missing = second is None or not text_of(second).strip()
        return None if is_missing else second

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
        """Tokens, as of the first caption."""
        return tokenize(texts)

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:
        """The first captions, then the second ones."""
        context = texts.shape[1]
        return torch.cat([texts, encoded[:, :context]])

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:  # noqa: ARG002
        """The features of both captions, apart."""
        first, second = output["text_features"].chunk(2)
        return {**output, "text_features": first, "caption_features": second}
