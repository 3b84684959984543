"""Ids of pairs that belong together, as open_clip's trainer reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankloss_features.data import ids_as_written, named_sample, read_id
from rankloss_open_clip.columns.csv_files import read_columns
from rankloss_trainers.pair_ids import CAPTIONS, check_column, make_ids


class PairIds:
    """The id of each pair in open_clip's data, which joins the model's output as ``pair_ids``.

    A :class:`rankloss_open_clip.columns.text_columns.TextColumn`: a hash that is made where the text is read,
    and so the same on all processes.

    Args:
        key: The source of the ids: captions, of which equal texts have one; or a column of the data, which a
            transform of a Hugging Face dataset has to return; in a webdataset __key__, the extension of a
            text file, or json:FIELD.
    """

    need = "ids"  # of rankloss_trainers.host.NEEDS

    def __init__(self, *, key: str = CAPTIONS) -> None:
        if not isinstance(key, str) or not key:
            raise ValueError(f"key must be captions or the name of a column; got {key!r}")
        self.key = key
        self.name = f"id of the pairs ({key})"

    def read_rows(self, path: str, separator: str, dataset: Any) -> list[int]:
        """The ids of a CSV file's rows.

        Raises:
            ValueError: The file has no such column, or a column of it that holds no ids.
        """
        if self.key == CAPTIONS:
            captions = [str(caption) for caption in dataset.captions]
            return make_ids(captions, CAPTIONS).tolist()
        (column,) = read_columns(path, separator, self.key)
        as_written = ids_as_written(path, separator, self.key, column)
        ids = make_ids(as_written, self.key)
        check_column(ids, self.key)
        return ids.tolist()

    def read_sample(self, sample: Mapping[str, Any], caption: str, image: bytes) -> int:  # noqa: ARG002
        """The id of a webdataset sample.

        Raises:
            ValueError: The sample has none.
        """
        value = caption if self.key == CAPTIONS else read_id(sample, self.key)
        if value is None:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            where = named_sample(sample)
            raise ValueError(f"{where} has no id {self.key!r} of its pair; it has {members}")
        return int(make_ids([value], self.key))

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:  # noqa: ARG002
        """The ids as integers, ``[n, 1]``."""
        return torch.tensor([[int(text)] for text in texts])

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:  # noqa: ARG002
        """The texts as they are."""
        return texts

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the ids."""
        return {**output, "pair_ids": encoded[:, 0]}
