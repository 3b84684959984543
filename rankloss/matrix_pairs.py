"""The two similarity matrices of a term, block of rows by block, and where the gradients by them go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.embeddings import Lists

__all__ = ["MatrixPair", "MirroredPair", "Target"]


class Target(NamedTuple):
    """The gradients of a matrix's anchors and items and of the scale; None where none is wanted."""

    anchors: Tensor | None
    items: Tensor | None
    scale: Tensor | None


class MatrixPair:
    """A block of rows is multiplied out, and its gradient taken to the embeddings, when its turn comes."""

    def __init__(self, lists: Lists, into: tuple[Target, Target], *, in_modal: bool) -> None:
        self.lists, self.in_modal = lists, in_modal
        self._matrices, self._into = (lists.first, lists.second), into
        self.wants_gradient = any(x is not None for target in into for x in target)

    def cosines(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of both."""
        return self.lists.first.rows(rows).cosines(), self.lists.second.rows(rows).cosines()

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
        """Take the gradient by some rows of one of them; None is zero. It may end before the last items."""
        if gradient is None:
            return
        similarity, into = self._matrices[side].rows(rows), self._into[side]
        items = slice(gradient.shape[-1])
        if into.anchors is not None:
            by_anchor = gradient @ similarity.items[items]
            into.anchors[rows] += by_anchor
            if into.scale is not None:
                into.scale.add_((by_anchor * similarity.anchors).sum())
        elif into.scale is not None:
            into.scale.add_((gradient * cosines[:, items]).sum())
        if into.items is not None:
            into.items[items].addmm_(gradient.T, similarity.anchors)


class MirroredPair(MatrixPair):
    """Entries that are one and the same product are multiplied out, and differentiated, once.

    v_i·t_j stands in S at (i, j) and in R at (j, i), v_i·v_j in I at (i, j) and at (j, i). An entry above the
    diagonal waits until the rows reach its mirror image below, which takes it over; its gradient waits
    likewise, and is added to that of the mirror image. Half of all products fall away. Of either there waits
    a quarter of a matrix a side at the most, halfway down.

    Every row belongs to one block, the blocks come in order, and of a block the first side comes first.
    """

    def __init__(self, lists: Lists, into: tuple[Target, Target], *, in_modal: bool) -> None:
        super().__init__(lists, into, in_modal=in_modal)
        self._cosines = _Waiting(), _Waiting()
        self._gradients = _Waiting(), _Waiting()

    def cosines(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of both: their products from the diagonal on, and before it what has waited."""
        found = tuple(self._rows_of(side, rows) for side in (0, 1))
        for waiting, cosines in zip(self._cosines, found, strict=True):
            waiting.keep(rows, cosines)
        return found[0], found[1]

    def _rows_of(self, side: int, rows: slice) -> Tensor:
        anchors, items = self._matrices[side].anchors[rows], self._matrices[side].items
        cosines = anchors.new_empty(len(anchors), len(items))
        for columns, mirror in self._cosines[self._mirror(side)].take(rows):
            cosines[:, columns] = mirror
        torch.mm(anchors, items[rows.start :].T, out=cosines[:, rows.start :])
        return cosines

    def add(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
        """Take the gradient by some rows."""
        waited = self._gradients[self._mirror(side)].take(rows)
        if gradient is not None:
            self._gradients[side].keep(rows, gradient)
        elif waited:  # a side has no gradient of its own, all or none of its blocks
            gradient = torch.zeros_like(cosines)
        else:
            return
        for columns, mirror in waited:
            gradient[:, columns] += mirror
        super().add(side, rows, cosines, gradient[:, : rows.stop])

    def _mirror(self, side: int) -> int:
        return side if self.in_modal else 1 - side


class _Waiting:
    """What stands above a matrix's diagonal, until the rows reach its mirror image."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[tuple[slice, Tensor]]] = {}  # by the first of the rows to come

    def keep(self, rows: slice, block: Tensor) -> None:
        """Keep the columns after the block's own rows, as copies that can be let go one after the other."""
        size = rows.stop - rows.start
        for start in range(rows.stop, block.shape[-1], size):
            later = block[:, start : start + size].clone()
            self._blocks.setdefault(start, []).append((rows, later))

    def take(self, rows: slice) -> list[tuple[slice, Tensor]]:
        """What has waited for these rows: their columns, and the mirror image that stands there."""
        return [(columns, block.T) for columns, block in self._blocks.pop(rows.start, ())]
