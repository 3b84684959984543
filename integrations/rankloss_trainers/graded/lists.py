"""Lists of graded candidates as data: checked, pooled, and padded to the lists of other processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankloss.distributed import Gather
from rankloss.graded import LARGEST_INTEGER
from rankloss.precision import has_float64
from rankloss_features.folder import hash_of

_logger = logging.getLogger("rankloss_trainers")

PADDING = -1
"""The index of a place without a candidate."""


@dataclass(frozen=True)
class Pooled:
    """The lists of a batch, with each distinct candidate once.

    Attributes:
        candidates: The M distinct candidates.
        ids: ``[M]``, equal for equal candidates on all processes.
        index: ``[N, K]``, the row of each candidate, or :data:`PADDING`.
        grades: ``[N, K]``, float64, since float32 would tie some; 0 at padding. A device may lack float64,
            and DeepSpeed rounds it to the model's precision: see :func:`encode_grades`.
    """

    candidates: list[Any]
    ids: Tensor
    index: Tensor
    grades: Tensor


def check_list(candidates: Any, grades: Any, where: str) -> list[tuple[Any, float]]:
    """The candidates of a list with their grades.

    Args:
        candidates: A list or tuple.
        grades: As many numbers of Python; −∞ stands below all other grades.
        where: The place of the list in the data, for the errors.

    Raises:
        ValueError: for anything but two lists, a list without candidates, another number of grades, a grade
            that is no number, NaN or +∞, an integer beyond 2⁵³, or a text twice with two grades.

    Example:
        >>> check_list(["a", "b"], [2, float("nan")], "row 3")
        Traceback (most recent call last):
        ValueError: grades must be numbers, or −infinity; got nan in row 3
    """
    if not isinstance(candidates, (list, tuple)) or not isinstance(grades, (list, tuple)):
        raise ValueError(f"candidates and grades must be lists; got others in {where}")
    if not candidates or len(candidates) != len(grades):
        raise ValueError(
            f"a list must have candidates, and a grade for each; got {len(candidates)} candidates and "
            f"{len(grades)} grades in {where}"
        )
    for grade in grades:
        _check_grade(grade, where)
    _check_one_grade_of_each(candidates, grades, where)
    return list(zip(candidates, map(float, grades), strict=True))


def _check_grade(grade: Any, where: str) -> None:
    """Raise a ValueError for a grade that is no number, NaN or +∞, or an integer that float64 would round."""
    is_number = isinstance(grade, (int, float)) and not isinstance(grade, bool)
    if not is_number or not grade < math.inf:  # NaN is not below either
        raise ValueError(f"grades must be numbers, or −infinity; got {grade!r} in {where}")
    if isinstance(grade, int) and abs(grade) > LARGEST_INTEGER:
        raise ValueError(f"integers must be at most 2⁵³ to stay distinct grades; got {grade} in {where}")


def _check_one_grade_of_each(candidates: Sequence[Any], grades: Sequence[float], where: str) -> None:
    """Raise a ValueError for a text twice with two grades; pictures are compared in a batch, by the loss."""
    grade_of: dict[str, float] = {}
    for candidate, grade in zip(candidates, grades, strict=True):
        if isinstance(candidate, str) and grade_of.setdefault(candidate, grade) != grade:
            both = f"{grade_of[candidate]!r} and {grade!r}"
            raise ValueError(
                f"grades must be one of each candidate; {candidate!r:.60} is twice in {where}, with {both}"
            )


def has_order(grades: Sequence[float]) -> bool:
    """True if two grades of a list differ.

    Example:
        >>> has_order([0, 0]), has_order([1, 0])
        (False, True)
    """
    return len({*grades}) > 1


def warn_of_ties(where: str) -> None:
    """Log that no list of the data has an order."""
    text = "No list of %s has two different grades: without in-batch negatives they teach nothing"
    _logger.warning(text, where)


def encode_grades(grades: Tensor) -> Tensor:
    """The bits of float64 grades as integers, which reach any device unchanged."""
    return grades.view(torch.int64)


def decode_grades(bits: Tensor) -> Tensor:
    """The grades of :func:`encode_grades`, on the device of the bits; float32 where it has no float64.

    Raises:
        ValueError: for unequal grades of a list that float32 would tie, or a grade that it cannot hold.
    """
    bits = bits.contiguous()
    if has_float64(bits.device):
        return bits.view(torch.float64)
    grades = bits.cpu().view(torch.float64)
    ordered = grades.sort(-1).values
    rounded = ordered.float()
    are_tied = (rounded[:, 1:] == rounded[:, :-1]) & (ordered[:, 1:] != ordered[:, :-1])
    are_infinite = rounded.isinf() & ordered.isfinite()
    is_lost = are_tied.any(-1) | are_infinite.any(-1)  # in each list
    if bool(is_lost.any()):
        row = int(is_lost.byte().argmax())
        raise ValueError(
            f"grades must stay distinct and finite in float32, the widest dtype of {bits.device}; list {row} "
            f"of the batch has {ordered[row].tolist()}"
        )
    return grades.float().to(bits.device)


def identify(candidate: Any) -> Hashable:
    """A key that is equal for texts, numbers, pictures and arrays of the same content.

    And for lists, tuples and mappings of such.

    Raises:
        ValueError: for any other object, which could be told apart by its address alone.

    Example:
        >>> identify({"text": "a", "size": [2, 3]}) == identify({"size": (2, 3), "text": "a"})
        True
    """
    if isinstance(candidate, str):  # NumPy's, too, which Python shows otherwise
        return str(candidate)
    if isinstance(candidate, float):
        return float(candidate)
    if candidate is None or isinstance(candidate, (bytes, int)):
        return candidate
    if isinstance(candidate, Tensor):
        flat = candidate.detach().cpu().contiguous().flatten()
        of_bytes = flat.view(torch.uint8).numpy()  # NumPy has no bfloat16
        return str(candidate.dtype), tuple(candidate.shape), of_bytes.tobytes()
    if isinstance(candidate, (np.ndarray, np.generic)) and not candidate.dtype.hasobject:
        return str(candidate.dtype), candidate.shape, candidate.tobytes()
    if hasattr(candidate, "tobytes") and hasattr(candidate, "mode"):  # a picture of Pillow
        has_palette = candidate.mode in ("P", "PA")  # whose bytes are indices into it
        picture = candidate.convert("RGBA") if has_palette else candidate
        return picture.mode, picture.size, picture.tobytes()
    if isinstance(candidate, Mapping):
        items = sorted((str(key), identify(value)) for key, value in candidate.items())
        return "mapping", tuple(items)
    if isinstance(candidate, (list, tuple)):
        return tuple(identify(item) for item in candidate)
    raise ValueError(
        f"candidates and queries must be texts, pictures, arrays or mappings of these; got {candidate!r:.60}"
    )


def hash_identity(key: Hashable) -> int:
    """64 bits of an :func:`identify`, the same on all processes."""
    eight_bytes = hash_of(repr(key).encode(), 8)
    return int.from_bytes(eight_bytes, "little", signed=True)


class Distinct:
    """Texts, pictures or other objects without repetitions, each with a row; equal are those of one content.

    Args:
        items: The first ones.

    Attributes:
        items: The distinct ones, by row.

    Example:
        >>> distinct = Distinct(["a", "b"])
        >>> distinct.rows_of(["b", "c", "b"]), distinct.items
        (tensor([1, 2, 1]), ['a', 'b', 'c'])
    """

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self.items: list[Any] = []
        self._rows: dict[Hashable, int] = {}  # by identity
        self.rows_of(items)

    def rows_of(self, items: Iterable[Any]) -> Tensor:
        """The row of each item, ``[n]``; one that is not there yet gets the next row."""
        rows = []
        for item in items:
            row = self._rows.setdefault(identify(item), len(self.items))
            if row == len(self.items):
                self.items.append(item)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int64)

    @property
    def ids(self) -> Tensor:
        """64 bits of each distinct item's content, ``[M]``, the same on all processes."""
        return torch.tensor([hash_identity(identity) for identity in self._rows])


def pool_lists(lists: Sequence[Sequence[tuple[Any, float]]]) -> Pooled:
    """Put the candidates of several lists into one pool without repetitions.

    Args:
        lists: The lists of :func:`check_list`.

    Example:
        >>> pool_lists([[("a", 2.0), ("b", 1.0)], [("b", 3.0)]]).index
        tensor([[ 0,  1],
                [ 1, -1]])
    """
    distinct = Distinct()
    index = [distinct.rows_of(candidate for candidate, _ in graded) for graded in lists]
    grades = [torch.tensor([grade for _, grade in graded], dtype=torch.float64) for graded in lists]
    return Pooled(
        candidates=distinct.items,
        ids=distinct.ids,
        index=pad_sequence(index, batch_first=True, padding_value=PADDING),
        grades=pad_sequence(grades, batch_first=True),
    )


def check_unique(queries: Sequence[Any], places: Sequence[str], remedy: str) -> None:
    """Raise a ValueError for a query twice in a batch: its lists' candidates would be each other's negatives.

    Args:
        queries: The queries.
        places: The place of each, "row N of the batch …".
        remedy: The advice that ends the error.
    """
    first_rows: dict[Hashable, int] = {}
    for row, query in enumerate(queries):
        first_row = first_rows.setdefault(identify(query), row)
        if first_row != row:
            raise ValueError(
                f"a query may be in a batch once; got it in row {first_row} and {places[row]}. {remedy}"
            )


def pad_lists(
    gather: Gather, candidates: Tensor, index: Tensor, grades: Tensor, ids: Tensor | None
) -> dict[str, Any]:
    """Arguments of :class:`rankloss.RankedLists`, of the same shapes on all processes.

    Args:
        gather: The gathering of the loss.
        candidates: ``[M, D]``, the features of a pool; M differs between processes.
        index: ``[N, K]`` of :class:`Pooled`; K differs between processes.
        grades: ``[N, K]``.
        ids: ``[M]``, or None.
    """
    _rank, world_size = gather.place
    if world_size > 1:
        own_sizes = torch.tensor([[len(candidates), index.shape[1]]], device=index.device)
        largest_pool, longest_list = gather.items(own_sizes).amax(0).tolist()
        rows_to_add, places_to_add = largest_pool - len(candidates), longest_list - index.shape[1]
        candidates = F.pad(candidates, (0, 0, 0, rows_to_add))
        index = F.pad(index, (0, places_to_add), value=PADDING)
        grades = F.pad(grades, (0, places_to_add))
        ids = None if ids is None else F.pad(ids, (0, rows_to_add))
    return {
        "candidate_features": candidates,
        "grades": grades,
        "candidate_index": index,
        "candidate_ids": ids,
        "mask": index != PADDING,
    }
