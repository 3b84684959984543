"""A caption that has columns beside it, and is the caption alone to every reader but the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Caption(str):
    """A caption of the training data, with a text of each column beside it.

    The trainer's filters and checks see the caption as it is in the data. A text made of it, by ``strip`` for
    instance, has no columns.

    Attributes:
        columns: The texts of the columns.
    """

    __slots__ = ("columns",)
    columns: tuple[str, ...]

    def __new__(cls, caption: str, columns: Iterable[Any] = ()) -> Caption:
        """Keep each column beside the caption, as text."""
        made = super().__new__(cls, caption)
        made.columns = tuple(text_of(column) for column in columns)
        return made

    def __str__(self) -> Caption:
        return self  # the trainer calls str() on the cells of a CSV file


class EncodedCaption(bytes):
    """A caption in a webdataset sample: bytes until the trainer decodes them, to a :class:`Caption`.

    Attributes:
        columns: The cells of the columns, which become texts with the caption.
    """

    columns: tuple[Any, ...]

    def __new__(cls, caption: bytes, columns: Iterable[Any]) -> EncodedCaption:
        """Keep the columns beside the bytes."""
        made = super().__new__(cls, caption)
        made.columns = tuple(columns)
        return made

    def decode(self, *args: Any, **kwargs: Any) -> Caption:
        """Decode the bytes as any others, and put the columns beside the caption."""
        return Caption(super().decode(*args, **kwargs), self.columns)


class CaptionsOfRows(Sequence[Caption]):
    """The captions of a CSV file's rows, each made when it is read, as the trainer's dataset holds them.

    Args:
        captions: The captions: a list, or a column of pandas.
        columns: The texts of each column, by rows.

    Raises:
        ValueError: A column has another number of rows.
    """

    def __init__(self, captions: Any, columns: Iterable[Iterable[Any]]) -> None:
        self._captions = getattr(captions, "iloc", captions)  # where pandas finds rows by their place
        self._columns = [column if isinstance(column, Sequence) else list(column) for column in columns]
        self._count = len(captions)
        for column in self._columns:
            if len(column) != self._count:
                raise ValueError(f"a column has {len(column)} rows beside {self._count} captions")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        return Caption(str(self._captions[row]), (column[row] for column in self._columns))

    @property
    def iloc(self) -> CaptionsOfRows:
        """Itself, for a reader that takes the captions for a column of pandas: ``captions.iloc[row]``."""
        return self


def text_of(value: Any) -> str:
    """A cell of a table or a member of a sample as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
