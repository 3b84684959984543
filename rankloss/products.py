r"""Blocks of the two similarity matrices of a term, and where the gradients by them go.

With G the gradient by the scores s·C, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q;

the factor s is left to the end of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    Two matrices, or all four in the order S, X, I, R: those with the same items, whose anchors then are one
    below the other, are one product, and all features are read half as often.
    The matrices of a teacher's features take no gradient, and the two may be one and the same.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        precision: Precision = "default",
        into: Sequence[Target] = (_NOWHERE, _NOWHERE),
    ) -> None:
        self._matrices, self._into = matrices, into
        self._factors = tuple((matrix.anchors, matrix.items) for matrix in matrices)
        if precision == "exact-order" and may_round(matrices[0].items):
            first, last = (factors_for_tf32(*self._factors[k]) for k in (0, -1))
            # X and I are made of the features of S and R.
            between = ((last[0], first[1]), (first[0], last[1])) if len(matrices) == 4 else ()
            self._factors = (first, *between, last)

    def take(self, rows: slice) -> Tensor:
        """The cosines of some rows of all matrices, ``[matrices, n, N]``."""
        first, *others = self._matrices
        is_one = all(matrix is first for matrix in others)
        anchors = first.anchors[rows]
        block = anchors.new_empty(1 if is_one else 1 + len(others), len(anchors), len(first.items))
        if len(block) == 4:
            both = torch.cat([self._factors[0][0][rows], self._factors[1][0][rows]])
            for side in (0, 2):
                torch.mm(both, self._factors[side][1].T, out=block[side : side + 2].flatten(0, 1))
        else:
            for side, out in enumerate(block):
                self._write(side, rows, out)
        return block.expand(len(self._matrices), -1, -1)

    def _write(self, side: int, rows: slice, out: Tensor) -> None:
        anchors, items = self._factors[side]
        torch.mm(anchors[rows], items.T, out=out)

    def give(self, sides: slice, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
        """Add the gradient by some rows of some of them, ``[matrices, n, N]`` in one; None is zero.

        Given that of all four at once, it does not read what it writes for the first time, so the sums need
        not be zeros before. Blocks of rows come in order.
        """
        first, count = sides.start, sides.stop - sides.start
        if count == 4:
            if gradient is not None:
                self._give_all(rows, gradient.view(cosines.shape))
            return
        parts = [None] * count if gradient is None else gradient.view(cosines.shape)
        for side, (block, part) in enumerate(zip(cosines, parts, strict=True), start=first):
            self._give(side, rows, block, part)

    def _give(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
        """Add that of one of them, which may end before the last items."""
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

    def _give_all(self, rows: slice, gradient: Tensor) -> None:
        anchors = torch.cat([matrix.anchors[rows] for matrix in self._matrices[:2]])
        by_anchor: Tensor | None = None
        needs_anchors = any(x is not None for into in self._into[:2] for x in (into.anchors, into.scale))
        for side in (0, 2):
            half, items = gradient[side : side + 2].flatten(0, 1), self._matrices[side].items
            if (by_items := self._into[side].items) is not None:
                by_items.addmm_(half.T, anchors, beta=1 if rows.start else 0)
            if needs_anchors:
                by_anchor = half @ items if by_anchor is None else by_anchor.addmm_(half, items)
        if by_anchor is None:
            return
        sums_of_items = [into.items for into in self._into]
        for into, part in zip(self._into, by_anchor.chunk(2), strict=False):
            if into.anchors is None:
                continue
            if any(into.anchors is x for x in sums_of_items):
                into.anchors[rows] += part
            else:
                into.anchors[rows] = part
        if (by_scale := self._into[0].scale) is not None:
            by_scale += by_anchor.mul_(anchors).sum()


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
        matrices: Sequence[Matrix],
        precision: Precision = "default",
        into: Sequence[Target] = (_NOWHERE, _NOWHERE),
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

    def _give(self, side: int, rows: slice, cosines: Tensor, gradient: Tensor | None) -> None:
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
        super()._give(side, rows, cosines, gradient[:, : rows.stop])


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
