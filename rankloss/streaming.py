r"""The pass over a batch's rows that gives CLIP's loss, both rank terms and their gradients.

It walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient of
every list (:mod:`rankloss.lists`) and adds the gradient to those of the features; the chunk's matrices are
then dropped. With G the gradient by the scores s·C of a matrix, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q = Σ (Gᵀ·Q)∘K.

One gradient by the scores serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I
and X the in-modal one. The scale's gradient is that of the anchors, times the anchors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss import lists
from rankloss.batch import PARTNER, RANK_TERMS, Batch, Inputs, Matrix, Term, matrices_of
from rankloss.options import RankOptions
from rankloss.plans import Plan, kernels
from rankloss.precision import full_precision
from rankloss.ranking import slices


class _Group(NamedTuple):
    """Matrices whose lists are evaluated together, and what each weighs; the weights are ``[matrices]``."""

    matrices: list[Matrix]
    references: list[Matrix]
    alpha: Tensor | None
    beta: Tensor | None

    @property
    def terms(self) -> list[int]:
        """The place of each matrix's rank term among the three terms."""
        return [1 if matrix.name in "SR" else 2 for matrix in self.matrices]


def stream(
    batch: Batch,
    options: RankOptions,
    plan: Plan,
    weights: Tensor,
    wanted: Sequence[bool],
    by: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight; their gradients.

    Args:
        batch: the features.
        options: of the rank terms.
        plan: how the pass is computed.
        weights: of the terms, ``[3]`` in float64; the terms are NaN where a feature is not finite or a
            score is too large.
        wanted: which of the terms are; the others are zero.
        by: by which of the batch's inputs a gradient is wanted.

    Returns:
        The three terms; the gradients of their sum by those inputs that take one, those by features
        without the factor s.
    """
    parts: list[list[Tensor]] = [[], [], []]  # of the three terms
    # The largest sums, by the items of all processes, are written by their first product.
    unwritten = set() if batch.image_anchors is None else {"image", "text"}
    wanted_by = [name for name, is_wanted in zip(Inputs._fields, by, strict=True) if is_wanted]
    # The anchors of S and R are all there are; their gradients make the scale's.
    sides = batch.matrices(matrices_of("cross_modal")) if "scale" in wanted_by else []
    summed = {*wanted_by, *(side.factors[0] for side in sides)} - {"scale"}
    sums = {
        name: (torch.empty_like if name in unwritten else torch.zeros_like)(x)
        for name, x in batch.inputs._asdict().items()
        if name in summed
    }
    fused = kernels() if plan.kernel == "triton" else None
    find = lists.first_equal if fused is None else fused.first_equal
    kind = _MirroredProducts if plan.is_mirrored else _Products
    # Autograd's book-keeping of every operation would be a sixth of a small batch's time.
    with full_precision(batch.image.device), torch.inference_mode():
        weights = batch.nan_beyond(lists.LARGEST_SCORE, weights)
        for group in _groups(batch, options, plan, weights, wanted):
            products = kind(group.matrices, sums, unwritten)
            by_teacher = kind(group.references, {}, set()) if group.references and batch.has_teacher else None
            first_equal = tuple(batch.first_equal(x, find) for x in group.references)
            found: list[lists.Evaluated] = []
            for rows in slices(batch.anchors, plan.chunk_size):
                block = lists.Block(
                    cosines=products.cosines(rows),
                    scale=batch.scale,
                    alpha=group.alpha,
                    beta=group.beta,
                    reference=None if by_teacher is None else by_teacher.cosines(rows),
                    first_equal=first_equal,
                    first_row=batch.first_row + rows.start,
                )
                of_block: lists.Evaluated
                if fused is None or block.beta is None:  # the kernels are for ranked lists
                    of_block = lists.evaluate(block, options, plan.lists_at_once, with_gradient=bool(sums))
                else:
                    of_block = fused.evaluate(block, options, with_gradient=bool(sums))
                if of_block.gradient is not None:
                    products.add_gradient(rows, of_block.gradient)
                found.append(of_block._replace(gradient=None))
            _add_values(parts, group, found)
    values = [functools.reduce(torch.add, x) if x else weights.new_zeros(()) for x in parts]
    if sides:
        of_images, of_texts = ((sums[side.factors[0]] * side.anchors).sum() for side in sides)
        # Where the items are the anchors, their gradients hold each matrix twice.
        sums["scale"] = (of_images + of_texts) * (0.5 if batch.image_anchors is None else 1.0)
    return values, [sums[name] for name in wanted_by]


def _groups(
    batch: Batch, options: RankOptions, plan: Plan, weights: Tensor, wanted: Sequence[bool]
) -> list[_Group]:
    """What is evaluated together: all matrices; where products wait for others, those of one term.

    Lists that are not ranked are a group of their own.
    """
    contrastive, *ranked = wanted
    terms: list[Term] = [term for term, w in zip(RANK_TERMS, ranked, strict=True) if w]
    n = batch.anchors
    halves = (weights * (0.5 / n)).unbind()  # a term is the mean of its two directions
    share = options.anchor_weight(n, len(batch.image)) * n
    of_images, of_texts = (2 * share * direction for direction in options.directions)
    is_waiting = plan.is_mirrored and plan.chunk_size < n
    groups = []
    for together in filter(None, [[term] for term in terms] if is_waiting else [terms]):
        names = matrices_of(*together)
        group = _Group(batch.matrices(names), batch.references(names), None, None)
        shares = [of_images if name in "SI" else of_texts for name in names]
        of_matrices = zip((halves[term] for term in group.terms), shares, strict=True)
        beta = torch.stack([half if x == 1 else half * x for half, x in of_matrices])
        groups.append(group._replace(beta=beta))
    if contrastive:
        if "cross_modal" not in terms:
            groups.insert(0, _Group(batch.matrices(matrices_of("cross_modal")), [], None, None))
        none = torch.zeros_like(halves[0])
        alpha = [halves[0] if matrix.name in "SR" else none for matrix in groups[0].matrices]
        groups[0] = groups[0]._replace(alpha=torch.stack(alpha))
    return groups


def _add_values(parts: Sequence[list[Tensor]], group: _Group, found: Sequence[lists.Evaluated]) -> None:
    if group.alpha is not None:
        cross_entropy = lists.together([x.cross_entropy for x in found if x.cross_entropy is not None])
        parts[0].append(torch.dot(group.alpha, cross_entropy.sum(-1)))
    if group.beta is not None:
        nll = lists.together([x.nll for x in found if x.nll is not None])
        of_matrices = (group.beta * nll.sum(-1)).unbind()
        for term, value in zip(group.terms, of_matrices, strict=True):
            parts[term].append(value)


# --- products ---------------------------------------------------------------------------------------------


class _Products:
    """Matrices that are multiplied out some rows at a time.

    Those with the same items make one product, with the anchors of one below those of the other.

    Args:
        matrices: of one batch.
        sums: the gradients by the fields of the batch, by name, to which those of the rows are added.
        unwritten: the names of sums that hold nothing yet; the first addition writes them.
    """

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor], unwritten: set[str]) -> None:
        self._matrices, self._sums, self._unwritten = matrices, sums, unwritten
        self._joined: dict[tuple[str, ...], Tensor] = {}  # anchors of the chunk, by the fields that they are

    def cosines(self, rows: slice) -> Tensor:
        """Some rows of every matrix, ``[matrices, n, N]``."""
        first = self._matrices[0]
        out = first.anchors.new_empty(len(self._matrices), rows.stop - rows.start, len(first.items))
        self._joined.clear()
        for start, group in self._by_items():
            part = out[start : start + len(group)].flatten(0, 1)
            of_anchors = tuple(matrix.factors[0] for matrix in group)
            if of_anchors not in self._joined:
                self._joined[of_anchors] = torch.cat([matrix.anchors[rows] for matrix in group])
            torch.mm(self._joined[of_anchors], group[0].items.T, out=part)
        return out

    def add_gradient(self, rows: slice, gradients: Tensor) -> None:
        """Add the gradients by the scores of some rows, which may be changed on the way."""
        by_anchors: dict[tuple[str, ...], Tensor] = {}
        for start, group in self._by_items():
            gradient = gradients[start : start + len(group)].flatten(0, 1)
            of_anchors, of_items = tuple(matrix.factors[0] for matrix in group), group[0].factors[1]
            if not self._sums.keys().isdisjoint(of_anchors):
                if of_anchors in by_anchors:
                    by_anchors[of_anchors].addmm_(gradient, group[0].items)
                else:
                    by_anchors[of_anchors] = torch.mm(gradient, group[0].items)
            if of_items in self._sums:
                beta = 0 if of_items in self._unwritten else 1
                self._sums[of_items].addmm_(gradient.T, self._joined[of_anchors], beta=beta)
                self._unwritten.discard(of_items)
        for of_anchors, total in by_anchors.items():
            for name, part in zip(of_anchors, total.chunk(len(of_anchors)), strict=True):
                if name in self._sums:
                    self._sums[name][rows] += part

    def _by_items(self) -> Iterator[tuple[int, list[Matrix]]]:
        """Matrices of the same items, and the place of the first."""
        start = 0
        for _, group in itertools.groupby(self._matrices, lambda matrix: matrix.factors[1]):
            same = list(group)
            yield start, same
            start += len(same)


class _MirroredProducts(_Products):
    """Entries that are one and the same product are multiplied out, and differentiated, once.

    v_i·t_j stands in S at (i, j) and in R at (j, i), v_i·v_j in I at (i, j) and at (j, i). An entry above the
    diagonal is kept until the rows reach its mirror image below, and so is its gradient, which is added to
    that of the mirror image. This halves the products. At most a quarter of each matrix, and of its gradient,
    is held at a time.

    Every item is an anchor. The rows come in order and in chunks of one size; S comes before R.
    """

    def __init__(self, matrices: Sequence[Matrix], sums: dict[str, Tensor], unwritten: set[str]) -> None:
        super().__init__(matrices, sums, unwritten)
        self._cosines: _Kept = {}
        self._gradients: _Kept = {}

    def cosines(self, rows: slice) -> Tensor:
        """Products from the diagonal on, and before it mirror images."""
        first = self._matrices[0]
        out = first.anchors.new_empty(len(self._matrices), rows.stop - rows.start, len(first.items))
        blocks = out.unbind()
        for matrix, block in zip(self._matrices, blocks, strict=True):
            for columns, mirror in self._cosines.pop((_mirror(matrix), rows.start), ()):
                block[:, columns] = mirror
            later = slice(rows.start, block.shape[1])
            if matrix.name == "R":
                _part(block, rows, 1).copy_(_part(blocks[0], rows, 1).T)
                later = slice(rows.stop, block.shape[1])
            if later.start < later.stop:
                anchors, items = _part(matrix.anchors, rows), _part(matrix.items, later)
                torch.mm(anchors, items.T, out=_part(block, later, 1))
            _keep(self._cosines, matrix, rows, block)
        return out

    def add_gradient(self, rows: slice, gradients: Tensor) -> None:
        """Add the gradients up to the diagonal with those of their mirror images, and keep the others."""
        blocks = gradients.unbind()
        for matrix, gradient in zip(self._matrices, blocks, strict=True):
            _keep(self._gradients, matrix, rows, gradient)
            for columns, mirror in self._gradients.pop((_mirror(matrix), rows.start), ()):
                gradient[:, columns] += mirror
            by_anchors = by_items = slice(0, rows.start)  # the columns in which there is a gradient
            if matrix.name != "R":  # whose entries at the diagonal are those of S
                by_anchors = slice(0, rows.stop)
                other = gradient
                if matrix.name == "S":
                    other, by_items = blocks[-1], by_anchors
                # Copied as it is turned: an addition would jump from row to row for every entry.
                own, turned = _part(gradient, rows, 1), _part(other, rows, 1).T
                own.add_(turned.clone(memory_format=torch.contiguous_format))
            of_anchors, of_items = matrix.factors
            if by_anchors.stop and of_anchors in self._sums:
                part, items = _part(gradient, by_anchors, 1), _part(matrix.items, by_anchors)
                _part(self._sums[of_anchors], rows).addmm_(part, items)
            if by_items.stop and of_items in self._sums:
                part, anchors = _part(gradient, by_items, 1), _part(matrix.anchors, rows)
                _part(self._sums[of_items], by_items).addmm_(part.T, anchors)


_Kept = dict[tuple[str, int], list[tuple[slice, Tensor]]]
"""What stands above the diagonal of a matrix: the rows' places and a block turned to its mirror image's
place, by the matrix's name and the first of the rows that reach it."""


def _part(x: Tensor, rows: slice, dim: int = 0) -> Tensor:
    """Some rows or columns; all of them are ``x`` itself, since views add up in a small batch."""
    size = rows.stop - rows.start
    return x if size == x.shape[dim] else x.narrow(dim, rows.start, size)


def _mirror(matrix: Matrix) -> str:
    """The matrix that holds the entries once more: R for S, and I or X itself."""
    return PARTNER[matrix.name] if matrix.name in "SR" else matrix.name


def _keep(kept: _Kept, matrix: Matrix, rows: slice, block: Tensor) -> None:
    """Keep the columns after the block's own rows, as copies that can be freed one after the other."""
    size = rows.stop - rows.start
    for start in range(rows.stop, block.shape[-1], size):
        later = block[:, start : start + size].clone()
        kept.setdefault((matrix.name, start), []).append((rows, later.T))
