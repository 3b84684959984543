"""Ids of pairs that belong together, as data: made from texts or integers, checked, and counted per batch."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankloss_trainers.lists import id_of, identity

_LARGEST = 2**63 - 1
_BATCHES = 100  # after so many without a partner a run is told


def ids_of(values: Sequence[Any] | Tensor, column: str) -> Tensor:
    """The ids of a batch or a whole column: ``[N]``, int64, the same on all processes and in every run.

    Integers are ids as they are. A text, such as a caption or a file name, has 64 bits of its hash. Texts are
    equal to the last character.

    Args:
        values: N texts, N integers of Python or NumPy, or a tensor of integers ``[N]``.
        column: The name of the column, for the errors.

    Raises:
        ValueError: for floats, booleans, missing values, texts beside integers, or integers beyond 64 bits.

    Example:
        >>> ids = ids_of(["a cat", "a dog", "a cat"], "caption")
        >>> bool(ids[0] == ids[2]), bool(ids[0] == ids[1])
        (True, False)
        >>> ids_of([0.5, 1.0], "score")
        Traceback (most recent call last):
        ValueError: ids of pairs must be texts or integers; column score has the float 0.5 in row 0
    """
    if isinstance(values, Tensor):
        if (
            values.dim() != 1
            or values.is_floating_point()
            or values.is_complex()
            or values.dtype == torch.bool
        ):
            shown = f"{values.dtype} {list(values.shape)}".removeprefix("torch.")
            raise ValueError(f"ids of pairs must be integers [N]; column {column} has {shown}")
        return values.long()
    first_kind = None
    for row, value in enumerate(values):
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_integer and not isinstance(value, str):
            kind = type(value).__name__
            raise ValueError(
                f"ids of pairs must be texts or integers; column {column} has the {kind} {value!r} in "
                f"row {row}"
            )
        if is_integer and not -_LARGEST - 1 <= value <= _LARGEST:
            raise ValueError(f"ids of pairs must have 64 bits; column {column} has {value} in row {row}")
        first_kind = is_integer if first_kind is None else first_kind
        if is_integer != first_kind:
            raise ValueError(
                f"ids of pairs must be all texts or all integers; column {column} has {values[0]!r} in row 0 "
                f"and {value!r} in row {row}"
            )
    ids = [int(value) if first_kind else id_of(identity(value)) for value in values]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def check_column(ids: Tensor, column: str) -> None:
    """Raise a ValueError for a whole column of one id, by which all pairs would belong together.

    Args:
        ids: ``[N]``, of all rows of the data.
        column: The name of the column.

    Example:
        >>> check_column(torch.tensor([7, 7, 7]), "split")
        Traceback (most recent call last):
        ValueError: column split has one value in all 3 rows, so all pairs would belong together
    """
    if len(ids) > 1 and bool((ids == ids[0]).all()):
        raise ValueError(
            f"column {column} has one value in all {len(ids)} rows, so all pairs would belong together"
        )


def have_partners(ids: Tensor) -> Tensor:
    """The number of pairs of a batch that have a partner in it, on the ids' device, without a wait.

    Example:
        >>> have_partners(torch.tensor([3, 1, 3, 2, 3]))
        tensor(3)
    """
    ordered = ids.sort().values
    equals_next = ordered[1:] == ordered[:-1]
    edge = equals_next.new_zeros(1)
    return (torch.cat([edge, equals_next]) | torch.cat([equals_next, edge])).sum()


class Partners:
    """The share of the pairs of an epoch that had a partner in their batch.

    The ids of a batch are those of all processes, as the loss has them. Counts stay on their device; they are
    read after the hundredth batch, if no earlier epoch had a partner, and at the end of an epoch.

    Example:
        >>> partners = Partners("captions")
        >>> partners.add(torch.tensor([1, 2, 1, 3]))
        >>> partners.end_of_epoch()
        '50.0 % of the pairs had a partner of the same captions in their batch'
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self._found: Tensor | int = 0
        self._pairs = self._batches = 0
        self._has_any = False

    def add(self, ids: Tensor) -> str | None:
        """Count a batch; after the first hundred without any partner, a sentence that says so."""
        self._found = self._found + have_partners(ids)
        self._pairs += len(ids)
        self._batches += 1
        if self._batches != _BATCHES or self._has_any:
            return None
        self._has_any = bool(self._found)
        return (
            None
            if self._has_any
            else f"{self._none_of()} in the first {_BATCHES} batches: ids change nothing"
        )

    def end_of_epoch(self) -> str | None:
        """The sentence for the log, or None after an epoch without batches; the next epoch starts at 0."""
        if not self._pairs:
            return None
        found = int(self._found)
        share = f"{found / self._pairs:.1%}".replace("%", " %")
        said = f"{share} of the pairs had a partner of the same {self.column} in their batch"
        self._has_any, pairs = self._has_any or found > 0, self._pairs
        self._found = self._pairs = 0
        return said if found else f"{self._none_of()} in {pairs} pairs: ids change nothing"

    def _none_of(self) -> str:
        return f"no pair had a partner of the same {self.column} in its batch"
