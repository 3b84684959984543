"""Graded lists of frozen features, and a division of them into training and measuring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from studies.photographs.features import Side
from studies.photographs.heads import Heads

Measured = dict[str, float]  # in percent


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of candidates for pictures, padded at their ends."""

    pictures: Tensor  # [N, D]
    index: Tensor  # [N, K]: rows of the candidates
    grades: Tensor  # [N, K], from 0 to 1
    mask: Tensor  # [N, K]: False is padding

    @classmethod
    def of(cls, pictures: Tensor, lists: Sequence[Sequence[tuple[int, float]]]) -> Lists:
        """Return lists of a candidate's row and its grade each, one for every picture."""
        longest = max(map(len, lists))
        index = torch.zeros(len(lists), longest, dtype=torch.long)
        grades, mask = torch.zeros(index.shape), torch.zeros(index.shape, dtype=torch.bool)
        for row, candidates in enumerate(lists):
            for place, (candidate, grade) in enumerate(candidates):
                index[row, place], grades[row, place], mask[row, place] = candidate, grade, True
        return cls(pictures, index, grades, mask)

    def __getitem__(self, rows: Tensor) -> Lists:
        """Return some of the lists, without places that are padding in all of them."""
        width = int(self.mask[rows].sum(1).max())
        return Lists(self.pictures[rows], *(x[rows, :width] for x in (self.index, self.grades, self.mask)))


@dataclasses.dataclass(frozen=True)
class Part:
    """A division of a task's data: pairs and lists to train on, and measures of other pictures."""

    pairs: Side
    candidates: Tensor  # [M, D']: features of sentences
    lists: Lists
    measure: Callable[[Heads], Measured]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set's divisions."""

    choice: Part  # to choose settings on
    tests: tuple[Part, ...]  # whose measures are averaged
    data: str  # fingerprint of all that the divisions hold
    items: dict[str, int]  # sizes
