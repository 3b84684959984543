r"""Products of features, some rows at a time, and the gradients by the features.

With G the gradient by the scores s·C of a matrix, C = Q·Kᵀ (anchors Q, items K), ∂Q = s·G·K and ∂K = s·Gᵀ·Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankloss.batch import Matrix
from rankloss.ranking import slices

FEWEST_ROWS = 128
"""Rows of a product below which its overhead exceeds its work."""

# Up to so many entries the matrices of a whole batch are held, so that their symmetries save products.
_WHOLE = 2**22


def products_of(matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> Products:
    """The products of one matrix, or of the two of a term; arguments as of :class:`Products`."""
    first, last = matrices[0].factors, matrices[-1].factors
    if len(matrices[0].items) ** 2 <= _WHOLE:
        if first == last[::-1]:
            return _Transposed(matrices, sums)
        if first[0] == first[1]:
            return _Symmetric(matrices, sums)
    return Products(matrices, sums)


class Products:
    """Matrices of one shape, multiplied out some rows at a time.

    Args:
        matrices: one, or the two of a term.
        sums: the gradients by the factors of the matrices, by name, to which those of the rows are added,
            lacking the factor s; None where none is wanted.

    Attributes:
        most_rows: the most rows that are worth taking at a time.
    """

    most_rows = 2**31

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> None:
        self._matrices = matrices
        self._sums: dict[str, Tensor] = {} if sums is None else sums

    def of_rows(self, rows: slice) -> Tensor:
        """Some rows of every matrix, ``[matrices, n, N]``, in memory of their own."""
        items = self._matrices[0].items
        out = items.new_empty(len(self._matrices), rows.stop - rows.start, len(items))
        for matrix, product in zip(self._matrices, out, strict=True):
            torch.mm(matrix.anchors[rows], matrix.items.T, out=product)
        return out

    def add_gradient(self, rows: slice, by_scores: Tensor) -> None:
        """Add the gradient by the scores of these rows."""
        for matrix, g in zip(self._matrices, by_scores, strict=True):
            self._add(matrix, rows, g)

    def finish(self) -> None:
        """Add the gradients that waited for other rows."""

    def _add(self, matrix: Matrix, rows: slice, by_scores: Tensor) -> None:
        of_anchors, of_items = matrix.factors
        if of_items in self._sums:
            self._sums[of_items].addmm_(by_scores.T, matrix.anchors[rows])
        else:  # the largest sum, by the items of all processes, is written by its first product
            self._sums[of_items] = by_scores.T @ matrix.anchors[rows]
        self._sum(of_anchors, matrix.anchors)[rows].addmm_(by_scores, matrix.items)

    def _sum(self, name: str, like: Tensor) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(like)
        return self._sums[name]


class _Transposed(Products):
    """S and R of a small batch, each product taken once: R is S transposed, and so is its gradient."""

    most_rows = FEWEST_ROWS

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> None:
        super().__init__(matrices, sums)
        self._S = matrices[0].anchors @ matrices[0].items.T
        self._G = self._S if sums is None else torch.zeros_like(self._S)

    def of_rows(self, rows: slice) -> Tensor:
        return torch.stack([self._S[rows], self._S[:, rows].T])

    def add_gradient(self, rows: slice, by_scores: Tensor) -> None:
        self._G[rows] += by_scores[0]
        self._G[:, rows] += by_scores[1].T.contiguous()

    def finish(self) -> None:
        self._add(self._matrices[0], slice(0, len(self._G)), self._G)


class _Symmetric(Products):
    """I and X of a small batch: the gradients by anchors and by items are one product, (G + Gᵀ)·K."""

    most_rows = FEWEST_ROWS

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> None:
        super().__init__(matrices, sums)
        self._held = super().of_rows(slice(0, len(matrices[0].items)))

    def of_rows(self, rows: slice) -> Tensor:
        return self._held[:, rows].clone()

    def add_gradient(self, rows: slice, by_scores: Tensor) -> None:
        self._held[:, rows] = by_scores  # in place of cosines that no later row needs

    def finish(self) -> None:
        for matrix, G in zip(self._matrices, self._held, strict=True):
            for rows in slices(len(G), FEWEST_ROWS):
                both = G[rows] + G[:, rows].T
                self._sum(matrix.factors[0], matrix.anchors)[rows].addmm_(both, matrix.items)
