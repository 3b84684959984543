r"""Blocks of the two similarity matrices of a term, and where the gradients by them go.

With G the gradient by the scores s·C, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q;

the factor s is left to the end of the pass.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rankloss.batch import Matrix
from rankloss.options import Precision

__all__ = ["MirroredProducts", "Products", "Target", "factors_for_tf32"]


class Target(NamedTuple):
    """Sums to which the gradients by a matrix's anchors, items and scale are added; None where not wanted."""

    anchors: Tensor | None
    items: Tensor | None
    scale: Tensor | None


_NOWHERE = Target(None, None, None)


class Products:
    """Blocks of rows, multiplied out when they are taken; their gradients go to the embeddings at once.

    The matrices of a teacher's features take no gradient, and the two may be one and the same.
    """

    def __init__(
        self,
        matrices: tuple[Matrix, Matrix],
        precision: Precision = "default",
        into: tuple[Target, Target] = (_NOWHERE, _NOWHERE),
    ) -> None:
        self._matrices, self._into = matrices, into
        self._factors = tuple((matrix.anchors, matrix.items) for matrix in matrices)
        if precision == "exact-order" and may_round(matrices[0].items):
            self._factors = tuple(factors_for_tf32(*factors) for factors in self._factors)

    def take(self, rows: slice) -> Tensor:
        """The cosines of some rows of both matrices, ``[2, n, N]``."""
        first, second = self._matrices
        is_one = second is first
        anchors = first.anchors[rows]
        pair = anchors.new_empty(1 if is_one else 2, len(anchors), len(first.items))
        for side, out in enumerate(pair):
            self._write(side, rows, out)
        return pair.expand(2, -1, -1)

    def _write(self, side: int, rows: slice, out: Tensor) -> None:
        anchors, items = self._factors[side]
        torch.mm(anchors[rows], items.T, out=out)

    def give(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
        """Add the gradient by some rows of one of them; None is zero. It may end before the last items."""
        if gradient is None:
            return
        matrix, into = self._matrices[side], self._into[side]
        anchors, items = matrix.anchors[rows], matrix.items[: gradient.shape[-1]]
        if into.anchors is not None:
            by_anchor = gradient @ items
            into.anchors[rows].add_(by_anchor)
            if into.scale is not None:
                into.scale.add_((by_anchor * anchors).sum())
        elif into.scale is not None:
            into.scale.add_((gradient * cosines[:, : len(items)]).sum())
        if into.items is not None:
            into.items[: len(items)].addmm_(gradient.T, anchors)


class MirroredProducts(Products):
    """Entries that are one and the same product are multiplied out, and differentiated, once.

    v_i·t_j stands in S at (i, j) and in R at (j, i), v_i·v_j in I at (i, j) and at (j, i). An entry above the
    diagonal is kept until the rows reach its mirror image below, and so is its gradient, which is added to
    that of the mirror image. This halves the number of products. At most a quarter of each matrix, and of its
    gradient, is held at a time.

    Every row belongs to one block, the blocks come in order, and of a block the first side comes first.
    """

    def __init__(
        self,
        matrices: tuple[Matrix, Matrix],
        precision: Precision = "default",
        into: tuple[Target, Target] = (_NOWHERE, _NOWHERE),
    ) -> None:
        super().__init__(matrices, precision, into)
        self._cosines: tuple[_Kept, _Kept] = ({}, {})
        self._gradients: tuple[_Kept, _Kept] = ({}, {})
        # The mirror image of S is R, and that of I or X the matrix itself.
        self._mirror = (1, 0) if matrices[0].name == "S" else (0, 1)

    def _write(self, side: int, rows: slice, out: Tensor) -> None:
        """Products from the diagonal on, and before it mirror images."""
        anchors, items = self._factors[side]
        for columns, mirror in _release(self._cosines[self._mirror[side]], rows):
            out[:, columns] = mirror
        torch.mm(anchors[rows], items[rows.start :].T, out=out[:, rows.start :])
        _keep(self._cosines[side], rows, out)

    def give(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
        """Add the gradient by some rows."""
        mirrors = _release(self._gradients[self._mirror[side]], rows)
        if gradient is not None:
            _keep(self._gradients[side], rows, gradient)
        elif mirrors:  # the other side has a gradient, this one has none in any of its blocks
            gradient = torch.zeros_like(cosines)
        else:
            return
        for columns, mirror in mirrors:
            gradient[:, columns] += mirror
        super().give(side, rows, cosines, gradient[:, : rows.stop])


def may_round(features: Tensor) -> bool:
    """Whether products of these features may be of numbers with fewer bits, as TF32 has."""
    return features.dtype == torch.float32 and features.device.type != "cpu"


def factors_for_tf32(anchors: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices ``[·, 3·D]`` whose product is A·Bᵀ to within float32's rounding when it is taken in TF32.

    A feature's 24 significant bits are divided, x = h + l, into the nearest number h that TF32 has, of 11
    bits, and the rest l, of 12 bits and a sign. Then A·Bᵀ = H·H'ᵀ + L·H'ᵀ + H·L'ᵀ but for 2⁻²⁴ of a summand,
    in which TF32 rounds l, and L·L'ᵀ is left out. No setting of torch's is changed, which other threads and
    compiled graphs would see.

    Example:
        >>> a, b = torch.tensor([[1 + 2.0**-15]]), torch.tensor([[1.0]])
        >>> left, right = factors_for_tf32(a, b)
        >>> left.tolist(), right.tolist(), torch.equal(left @ right.T, a @ b.T)
        ([[1.0, 3.0517578125e-05, 1.0]], [[1.0, 1.0, 0.0]], True)
    """
    (high, low), (high_2, low_2) = _halves(anchors), _halves(items)
    return torch.cat([high, low, high], -1), torch.cat([high_2, high_2, low_2], -1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = (x.view(torch.int32) + 2**12).bitwise_and_(-(2**13)).view(torch.float32)
    return high, x - high


# What stands above a matrix's diagonal, by the first of the rows that reach its mirror image.
_Kept: TypeAlias = dict[int, list[tuple[slice, Tensor]]]


def _keep(kept: _Kept, rows: slice, block: Tensor) -> None:
    """Keep the columns after the block's own rows, as copies that can be freed one after the other."""
    size = rows.stop - rows.start
    for start in range(rows.stop, block.shape[-1], size):
        later = block[:, start : start + size].clone()
        kept.setdefault(start, []).append((rows, later))


def _release(kept: _Kept, rows: slice) -> list[tuple[slice, Tensor]]:
    """What was kept for these rows: their columns, and the mirror image that stands there."""
    return [(columns, block.T) for columns, block in kept.pop(rows.start, ())]
