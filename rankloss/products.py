r"""Products of features, some rows at a time, and the gradients by the features.

With G the gradient by the scores s·C of a matrix, C = Q·Kᵀ (anchors Q, items K), ∂Q = s·G·K and ∂K = s·Gᵀ·Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankloss.batch import Matrix

FEWEST_ROWS = 128
"""Rows of a product below which its overhead exceeds its work."""

_WHOLE = 2**22  # entries up to which the matrices of a whole batch are held


def products_of(matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> Products:
    """The products of one matrix, or of the two of a term; arguments as of :class:`Products`."""
    is_local = any(matrix.factors[0].endswith("_anchors") for matrix in matrices)
    if len(matrices) == 2 and not is_local and len(matrices[0].items) ** 2 <= _WHOLE:
        return _Whole(matrices, sums)
    return Products(matrices, sums)


class Products:
    """Matrices of one shape, multiplied out some rows at a time.

    Args:
        matrices: one, or the two of a term.
        sums: the gradients by the factors of the matrices, by name, to which those of the rows are added,
            lacking the factor s; None where none is wanted.
    """

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> None:
        self._matrices = matrices
        self._sums: dict[str, Tensor] = {} if sums is None else sums

    def of_rows(self, rows: slice) -> Tensor:
        """Some rows of every matrix, ``[matrices, n, N]``, which their gradient may overwrite."""
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


class _Whole(Products):
    """The two matrices of a term of a small batch, held as wholes; their symmetries save products.

    R is S transposed, and so is its gradient. For I and X the gradients by anchors and by items are one
    product, (G + Gᵀ)·K. The gradient of a row is written in place of its cosines, which no later row needs.
    """

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor] | None) -> None:
        super().__init__(matrices, sums)
        self._is_transposed = matrices[0].factors == matrices[1].factors[::-1]
        self._all = slice(0, len(matrices[0].items))
        if self._is_transposed:
            S = matrices[0].anchors @ matrices[0].items.T
            self._held = torch.stack([S, S.T])
        else:
            self._held = super().of_rows(self._all)

    def of_rows(self, rows: slice) -> Tensor:
        return self._held[:, rows]

    def add_gradient(self, rows: slice, by_scores: Tensor) -> None:
        if by_scores.data_ptr() != self._held[:, rows].data_ptr():
            self._held[:, rows] = by_scores

    def finish(self) -> None:
        if self._is_transposed:
            of_images, of_texts = self._held
            self._add(self._matrices[0], self._all, of_images.add_(of_texts.T.contiguous()))
            return
        for matrix, G in zip(self._matrices, self._held, strict=True):
            both = G.T.contiguous().add_(G)
            self._sum(matrix.factors[0], matrix.anchors).addmm_(both, matrix.items)
