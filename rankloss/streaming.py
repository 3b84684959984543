r"""The pass over a batch's rows that gives CLIP's loss, both rank terms and their gradients.

It walks over chunks of anchors. For each it forms the chunk's similarities, takes values and gradient of
every list (:mod:`rankloss.lists`) and adds the gradient to those of the features; the chunk's matrices are
then dropped. With G the gradient by the scores s·C of a matrix, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q.

One gradient by the scores serves all terms: S and R carry CLIP's cross-entropy and the cross-modal term, I
and X the in-modal one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss import kernels, lists
from rankloss.batch import RANK_TERMS, Batch, Inputs, Matrix, Term, matrices_of
from rankloss.options import RankOptions
from rankloss.plans import Plan
from rankloss.precision import full_precision
from rankloss.ranking import slices

__all__ = ["stream"]


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight; their gradients.

    Where one chunk holds all rows, R is the transpose of S, and I and X are their own: the gradients by two
    entries that are one product are added before they are multiplied out: seven products in place of twelve.

    Args:
        batch: the features.
        options: of the rank terms.
        plan: how the pass is computed.
        weights: of the terms, ``[3]`` in float64.
        wanted: which of the terms are; the others stay zero.
        by: by which of the batch's inputs a gradient is wanted.

    Returns:
        The terms, ``[3]``; the gradients of their sum by the fields of the batch, those by features without
        the factor s.
    """
    engine = kernels if plan.kernel == "triton" else lists
    values = weights.new_zeros(3)
    # The largest sums, by the items of all processes, are written by their first product.
    unwritten = set() if batch.image_anchors is None else {"image", "text"}
    sums = {
        name: (torch.empty_like if name in unwritten else torch.zeros_like)(x)
        for name, x, is_wanted in zip(Inputs._fields, batch.inputs, by, strict=True)
        if x is not None and is_wanted
    }
    is_whole = plan.chunk_size == len(batch.image) and batch.image_anchors is None
    groups = _groups(batch, options, weights, wanted)
    with full_precision(batch.image.device):
        for rows in slices(batch.anchors, plan.chunk_size):
            chunk: _Chunk = {}
            for group in groups:
                by_teacher = group.references and batch.has_teacher
                block = lists.Block(
                    cosines=_cosines(group.matrices, rows, is_whole, chunk),
                    scale=batch.scale,
                    alpha=group.alpha,
                    beta=group.beta,
                    reference=_cosines(group.references, rows, is_whole, chunk) if by_teacher else None,
                    first_equal=tuple(batch.first_equal(x, engine.first_equal) for x in group.references),
                    first_row=batch.first_row + rows.start,
                )
                found = engine.evaluate(block, options, plan.lists_at_once, with_gradient=bool(sums))
                _add_values(values, group, found)
                if found.gradient is None:
                    continue
                if is_whole:
                    _add_whole_gradient(sums, group.matrices, block.cosines, found.gradient)
                else:
                    _add_gradient(sums, unwritten, group.matrices, rows, chunk, found.gradient)
    return values, sums


def _groups(batch: Batch, options: RankOptions, weights: Tensor, wanted: Sequence[bool]) -> list[_Group]:
    """What is evaluated together: everything, except lists that are ranked beside lists that are not."""
    contrastive, *ranked = wanted
    terms: list[Term] = [term for term, w in zip(RANK_TERMS, ranked, strict=True) if w]
    both = matrices_of("cross_modal")
    halves = (weights * (0.5 / batch.anchors)).unbind()  # a term is the mean of its two directions
    groups = []
    names = matrices_of(*terms) if terms else ()
    if names:
        share = options.anchor_weight(batch.anchors, len(batch.image)) * batch.anchors
        of_images, of_texts = (2 * share * direction for direction in options.directions)
        matrices = batch.matrices(names)
        group = _Group(matrices, batch.references(names), None, None)
        shares = [of_images if name in "SI" else of_texts for name in names]
        of_matrices = zip((halves[term] for term in group.terms), shares, strict=True)
        beta = torch.stack([half if x == 1 else half * x for half, x in of_matrices])
        groups.append(group._replace(beta=beta))
    if contrastive:
        if not set(both) <= set(names):
            names = both
            groups.append(_Group(batch.matrices(names), [], None, None))
        none = torch.zeros_like(halves[0])
        alpha = torch.stack([halves[0] if name in both else none for name in names])
        groups[-1] = groups[-1]._replace(alpha=alpha)
    return groups


def _add_values(values: Tensor, group: _Group, found: lists.Evaluated) -> None:
    if group.alpha is not None and found.cross_entropy is not None:
        values[0] += group.alpha @ found.cross_entropy.sum(-1)
    if group.beta is not None and found.nll is not None:
        of_matrices = group.beta * found.nll.sum(-1)
        # A term's two matrices are the first and the last, the second and the last but one.
        of_terms = (of_matrices + of_matrices.flip(0))[: len(of_matrices) // 2]
        first = group.terms[0]
        values[first : first + len(of_terms)] += of_terms


def _cosines(matrices: Sequence[Matrix], rows: slice, is_whole: bool, chunk: _Chunk) -> Tensor:
    """``[matrices, n, N]``, some rows of each."""
    first = matrices[0]
    out = first.anchors.new_empty(len(matrices), rows.stop - rows.start, len(first.items))
    for start, group in _by_items(matrices):
        if is_whole and group[-1].name == "R":
            out[-1].copy_(out[0].T)  # S
            group = group[:-1]
        if group:
            cosines = out[start : start + len(group)].flatten(0, 1)
            torch.mm(_anchors(group, rows, chunk), group[0].items.T, out=cosines)
    return out


def _by_items(matrices: Sequence[Matrix]) -> Iterator[tuple[int, list[Matrix]]]:
    """Matrices of the same items, which make one product, and the place of the first."""
    start = 0
    for _, group in itertools.groupby(matrices, lambda matrix: matrix.factors[1]):
        same = list(group)
        yield start, same
        start += len(same)


_Chunk = dict[tuple[str, ...], Tensor]
"""The anchors of a chunk, one matrix's below the other's, by the fields of the batch that they are."""


def _anchors(matrices: Sequence[Matrix], rows: slice, chunk: _Chunk) -> Tensor:
    fields = tuple(matrix.factors[0] for matrix in matrices)
    if fields not in chunk:
        parts = [matrix.anchors[rows] for matrix in matrices]
        chunk[fields] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return chunk[fields]


def _add_gradient(
    sums: dict[str, Tensor],
    unwritten: set[str],
    matrices: Sequence[Matrix],
    rows: slice,
    chunk: _Chunk,
    gradients: Tensor,
) -> None:
    by_anchors: _Chunk = {}
    for start, group in _by_items(matrices):
        gradient = gradients[start : start + len(group)].flatten(0, 1)
        of_anchors, of_items = tuple(matrix.factors[0] for matrix in group), group[0].factors[1]
        if "scale" in sums or not sums.keys().isdisjoint(of_anchors):
            if of_anchors in by_anchors:
                by_anchors[of_anchors].addmm_(gradient, group[0].items)
            else:
                by_anchors[of_anchors] = gradient @ group[0].items
        if of_items in sums:
            anchors = _anchors(group, rows, chunk)
            sums[of_items].addmm_(gradient.T, anchors, beta=0 if of_items in unwritten else 1)
            unwritten.discard(of_items)
    for of_anchors, total in by_anchors.items():
        for name, part in zip(of_anchors, total.chunk(len(of_anchors)), strict=True):
            if name in sums:
                sums[name][rows] += part
        if "scale" in sums:
            sums["scale"] += total.mul_(chunk[of_anchors]).sum()


def _add_whole_gradient(
    sums: dict[str, Tensor], matrices: Sequence[Matrix], cosines: Tensor, gradients: Tensor
) -> None:
    if "scale" in sums:
        sums["scale"] += (gradients * cosines).sum()
    for matrix, gradient in zip(matrices, gradients, strict=True):
        if matrix.name == "R":
            continue
        of_anchors, of_items = matrix.factors
        both = gradient + (gradients[-1] if matrix.name == "S" else gradient).T
        if of_anchors in sums:
            sums[of_anchors].addmm_(both, matrix.items)
        if of_items != of_anchors and of_items in sums:
            sums[of_items].addmm_(both.T, matrix.anchors)
