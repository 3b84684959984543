"""A batch of checked features, and the similarity matrices whose rows the rank terms compare.

Notation: V, T are image and text features, s the scale; S = s·V·Tᵀ, R = s·T·Vᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ. The
cross-modal term compares S with R, the in-modal term I with X, row by row. A matrix is described by its
anchors (rows) and its items (columns).

Ties must be exact for a loss to be independent of the order of the items. A matrix product does not guarantee
exact ties: the columns of two identical captions can differ by rounding, because the kernel sums edge columns
in another order than the rest. So equal rows of features are detected by their bits, before any product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.precision import arithmetic_dtype, constant, in_arithmetic, product, sum_dtype

Term = Literal["cross_modal", "in_modal"]

RANK_TERMS: tuple[Term, Term] = ("cross_modal", "in_modal")

_MODALITIES = {
    "cross_modal": (("image", "text"), ("text", "image")),
    "in_modal": (("image", "image"), ("text", "text")),
}
"""The modalities of the anchors and of the items, of both matrices of a term."""


class Inputs(NamedTuple):
    """The differentiable inputs of a batch's terms, or one entry for each of them."""

    image: Any
    text: Any
    image_anchors: Any
    text_anchors: Any
    scale: Any


class Matrix(NamedTuple):
    """The cosines of n anchors with N items.

    Attributes:
        anchors: ``[n, D]``.
        items: ``[N, D]``.
        factors: the names of both among :class:`Inputs`; of a teacher's matrix the modalities of both.
    """

    anchors: Tensor
    items: Tensor
    factors: tuple[str, str]

    @property
    def item_factor(self) -> str:
        """The name of the items, which is a modality."""
        return self.factors[1]

    def cosines(self) -> Tensor:
        """The whole matrix, ``[n, N]``, differentiable any number of times, in full precision."""
        return product(self.anchors, self.items.T)


# --- equal rows -------------------------------------------------------------------------------------------

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio in 64 bits: its multiples are far apart
MIXING_SHIFT = 31  # a bit, or its copy so many places below, then has 31 above it, where a product carries it


def first_occurrence(features: Tensor) -> Tensor:
    """:func:`first_equal` as a tensor in any case."""
    first = first_equal(features)
    return torch.arange(len(features), device=features.device) if first is None else first


def first_equal(features: Tensor) -> Tensor | None:
    """Index of the first row that equals row i, for every i, ``[N]``; on a CPU None if no two rows are equal.

    The index is i itself for the first of equal rows, and for a row with NaN, which equals no row.

    Args:
        features: ``[N, D]``, float32 or float64.

    Example:
        >>> first_equal(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
        [0, 1, 0]

    Rows are compared by a 64-bit hash, and each match is confirmed on the values, so different rows never
    count as equal. If different rows share a hash, expected once in some 10⁹ batches, the later rows may miss
    their equals. Memory is O(N·D), and an accelerator's host does not wait.
    """
    features = features.detach().resolve_neg()  # NumPy has no negative bit
    can_be_looked_at = features.is_cpu  # a condition on values of an accelerator would make the host wait
    if can_be_looked_at and _have_distinct_beginnings(features):
        return None
    hashes = row_hashes(features)
    ordered, order = hashes.sort(stable=True)  # stable: a group's first is its least
    if can_be_looked_at and not bool((ordered[1:] == ordered[:-1]).any()):
        return None
    candidate = order[torch.searchsorted(ordered, hashes)]  # the first row of the same hash
    is_confirmed = (features[candidate] == features).all(-1)
    itself = torch.arange(len(features), device=features.device)
    return torch.where(is_confirmed, candidate, itself)


def _have_distinct_beginnings(features: Tensor) -> bool:
    """True if no two rows have the same first eight bytes, a quick proof that none are equal; on a CPU."""
    entries = 8 // features.itemsize
    beginnings = np.add(features.numpy()[:, :entries], 0.0, order="C")  # the sum turns −0.0 into 0.0
    integer_of_row = f"i{beginnings[0].nbytes}"  # a NumPy dtype of all bytes of a row's beginning
    integers = beginnings.view(integer_of_row).ravel().tolist()
    return len(set(integers)) == len(integers)


def row_hashes(features: Tensor) -> Tensor:
    """A 64-bit hash of every row, ``[N]``; equal rows have equal hashes.

    The bits of the entries, read as 64-bit integers, are multiplied by an odd number per column and summed in
    wrapping integer arithmetic, so the value does not depend on the order of summation. Each upper bit is
    first copied 31 places down, where the product has room above it. No step is floating-point arithmetic on
    the entries, since flushing of subnormals depends on the thread.
    """
    bits = features.detach().contiguous().view(_BITS[features.dtype])
    negative_zero = torch.iinfo(bits.dtype).min  # the sign bit alone
    bits = F.threshold(bits, negative_zero, 0)  # all larger integers stay, and −0.0 becomes 0.0
    if bits.dtype == torch.int32 and bits.shape[1] % 2:
        bits = F.pad(bits, (0, 1))
    words = bits.view(torch.int64)
    # A float32 such as 1.0 has upper bits alone: without copies a product would shift them out of the word.
    words = (words >> MIXING_SHIFT).bitwise_xor_(words)
    factors = torch.arange(words.shape[1], device=words.device).mul_(GOLDEN).bitwise_or_(1)
    return words.mul_(factors).sum(-1)


# --- a batch ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch's features, in the dtype of the arithmetic.

    Attributes:
        inputs: ``image`` and ``text``, ``[N, D]``, the items of all lists; ``image_anchors`` and
            ``text_anchors``, ``[n, D]``, the anchors of this process in a distributed batch, or None if every
            item is an anchor; the scale s.
        anchors: the number of anchors of this process, n.
        items: the length of a list, N.
        first_row: the place of the first anchor among the items.
        teacher: ``[N, D']`` by modality, a teacher's features of the items, which rank the lists; or None. A
            teacher of one modality ranks both modalities, since the items of a list are the same pairs.
        sum_dtype: of the sums over a list, see :func:`rankloss.precision.sum_dtype`.
        find_equal: the search for equal items, see :func:`first_equal`.
    """

    inputs: Inputs
    anchors: int
    items: int
    first_row: int
    teacher: dict[str, Tensor] | None
    sum_dtype: torch.dtype
    find_equal: Callable[[Tensor], Tensor | None] = first_equal

    @classmethod
    def of(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        anchors: tuple[Tensor, Tensor] | None = None,
        first_row: int = 0,
        teacher: Sequence[Tensor | None] = (None, None),
    ) -> Batch:
        """Convert checked features and the scale to float32, or to float64 if either modality is float64.

        Args:
            image_features: ``[N, D]``, the items.
            text_features: ``[N, D]``, the items.
            logit_scale: the multiplier s.
            anchors: this process's images and texts; None if every item is an anchor.
            first_row: the place of the first anchor among the items.
            teacher: a teacher's features of images and of texts, which get the same dtype and lose their
                graph.
        """
        dtype = arithmetic_dtype(image_features, text_features)
        device = image_features.device
        inputs = Inputs(
            image=in_arithmetic(image_features, dtype, device),
            text=in_arithmetic(text_features, dtype, device),
            image_anchors=None if anchors is None else in_arithmetic(anchors[0], dtype, device),
            text_anchors=None if anchors is None else in_arithmetic(anchors[1], dtype, device),
            scale=in_arithmetic(logit_scale, dtype, device).reshape(()),
        )
        teachers = [in_arithmetic(constant(x), dtype, device) for x in teacher if x is not None]
        n_items = len(image_features)
        return cls(
            inputs,
            anchors=n_items if anchors is None else len(anchors[0]),
            items=n_items,
            first_row=first_row,
            # With a teacher of one modality, the first and the last are the same.
            teacher={"image": teachers[0], "text": teachers[-1]} if teachers else None,
            sum_dtype=sum_dtype(inputs.image),
        )

    @property
    def positives(self) -> Tensor:
        """``[n]``: the column of every anchor's own pair."""
        return torch.arange(self.first_row, self.first_row + self.anchors, device=self.inputs.image.device)

    @property
    def features(self) -> list[Tensor]:
        """The features of all items, including a teacher's."""
        return [self.inputs.image, self.inputs.text, *(self.teacher or {}).values()]

    def matrices(self, term: Term) -> tuple[Matrix, Matrix]:
        """The two matrices of a term, with images and with texts as anchors: S and R, or I and X."""
        features = self.inputs._asdict()
        matrices = []
        for anchors, items in _MODALITIES[term]:
            if self.inputs.image_anchors is not None:  # this process has only some of the items as anchors
                anchors = f"{anchors}_anchors"
            matrices.append(Matrix(features[anchors], features[items], (anchors, items)))
        return matrices[0], matrices[1]

    def references(self, term: Term) -> tuple[Matrix, Matrix]:
        """The matrices that rank the two matrices of a term.

        Without a teacher each ranks the other; with a teacher S is ranked by S', R by R', I by I' and X by
        X'.
        """
        of_images, of_texts = self.matrices(term)
        if self.teacher is None:
            return of_texts, of_images
        rows = slice(self.first_row, self.first_row + self.anchors)
        matrices = []
        for anchors, items in _MODALITIES[term]:
            matrices.append(Matrix(self.teacher[anchors][rows], self.teacher[items], (anchors, items)))
        return matrices[0], matrices[1]

    @functools.cached_property
    def first_equal(self) -> dict[str, Tensor | None]:
        """``[N]`` by modality: the first reference item equal to item j; None if no two items are equal."""
        ranked_by = self.teacher or {"image": self.inputs.image, "text": self.inputs.text}
        return {modality: self.find_equal(x) for modality, x in ranked_by.items()}

    def exact_reference(self, matrix: Matrix, cosines: Tensor) -> Tensor:
        """Rows of cosines as a reference: no gradient, equal items tied exactly despite rounding."""
        equal = self.first_equal[matrix.item_factor]
        return cosines.detach() if equal is None else cosines.detach().index_select(-1, equal)


def other_items(own: Tensor, n: int) -> Tensor:
    """The columns of a matrix's rows without each row's own: ``[len(own), n − 1]``.

    Example:
        >>> other_items(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    place = torch.arange(n - 1, device=own.device)
    return place + (place >= own[:, None])  # places from the own column on are one column further
