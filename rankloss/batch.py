"""A batch of checked features, and the four similarity matrices whose rows the rank terms compare.

Notation: V, T are image and text features, s the scale; S = s·V·Tᵀ, R = s·T·Vᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ. The
cross-modal term compares S with R, the in-modal term I with X, row by row. A matrix is described by its
anchors (rows) and its items (columns); it is multiplied out chunk by chunk, or as a whole in
:mod:`rankloss.dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rankloss.equal_rows import first_equal
from rankloss.precision import arithmetic_dtype, dtype_of_numbers, full_precision, nan_unless_finite

Term = Literal["cross_modal", "in_modal"]
Name = Literal["S", "R", "I", "X"]

RANK_TERMS: tuple[Term, Term] = ("cross_modal", "in_modal")

_OF_TERM: dict[Term, tuple[Name, Name]] = {"cross_modal": ("S", "R"), "in_modal": ("X", "I")}
PARTNER: dict[Name, Name] = {"S": "R", "R": "S", "I": "X", "X": "I"}
_FACTORS = {
    "S": ("image_anchors", "text"),
    "R": ("text_anchors", "image"),
    "I": ("image_anchors", "image"),
    "X": ("text_anchors", "text"),
}
_UNIT = 0.01  # how far the norm of a row may be from 1 for the row to count as unit-norm


def matrices_of(*terms: Term) -> tuple[Name, ...]:
    """The matrices that some terms compare: the first with the last, the second with the last but one.

    Example:
        >>> matrices_of("cross_modal", "in_modal"), matrices_of("in_modal")
        (('S', 'X', 'I', 'R'), ('X', 'I'))
    """
    firsts, seconds = zip(*(_OF_TERM[term] for term in terms), strict=True)
    return (*firsts, *reversed(seconds))


class Inputs(NamedTuple):
    """What a batch's terms are differentiated by: the tensors, or one thing for each of them."""

    image: Tensor | None
    text: Tensor | None
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor | None


class Matrix(NamedTuple):
    """The cosines of n anchors with N items.

    Attributes:
        name: which of the four.
        anchors: ``[n, D]``.
        items: ``[N, D]``.
        factors: the fields of the batch that anchors and items are.
    """

    name: Name
    anchors: Tensor
    items: Tensor
    factors: tuple[str, str]

    def cosines(self) -> Tensor:
        """All of them: ``[n, N]``, differentiable any number of times, whatever autocast asks for."""
        cosines: Tensor = _Product.apply(self.anchors, self.items.T)  # type: ignore[no-untyped-call]
        return cosines


class _Product(torch.autograd.Function):
    """``a @ b``, also where the backward pass runs in an autocast region."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device):
            return a @ b

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        by_a, by_b = ctx.needs_input_grad
        return (
            _Product.apply(upstream[0], b.T) if by_a else None,  # type: ignore[no-untyped-call]
            _Product.apply(a.T, upstream[0]) if by_b else None,  # type: ignore[no-untyped-call]
        )


@dataclass(frozen=True)
class Batch:
    """A batch's features, in the dtype of the arithmetic and on its device.

    ``image`` and ``text``, ``[N, D]``, hold the items that lists are made of. ``image_anchors`` and
    ``text_anchors``, where they are not None, hold the rows that have lists here, ``[n, D]`` (the local ones
    of a distributed batch), which begin at row ``first_row`` of the items. ``home`` is the device of the
    features as they were given, where the values of the terms go. ``reference_image`` and ``reference_text``,
    ``[N, D']``, are a teacher's features of the items, which the lists are ranked by; None where there are
    none.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    image_anchors: Tensor | None = None
    text_anchors: Tensor | None = None
    first_row: int = 0
    reference_image: Tensor | None = None
    reference_text: Tensor | None = None
    home: torch.device | None = None
    _first_equal: dict[str, Tensor | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        anchors: tuple[Tensor, Tensor] | None = None,
        first_row: int = 0,
        reference_image: Tensor | None = None,
        reference_text: Tensor | None = None,
    ) -> Batch:
        """Bring checked features to float32, or to float64 if either is that.

        A teacher's features, whatever their dtype, are brought to the same dtype and lose their graph. On
        MPS, which has no float64, everything is brought to the CPU.
        """
        dtype, home = arithmetic_dtype(image_features, text_features), image_features.device
        device = torch.device("cpu") if home.type == "mps" else home

        def there(x: Tensor) -> Tensor:
            return x.to(device).to(dtype)

        scale = scalar(logit_scale, home).to(device, non_blocking=True).to(dtype)
        return cls(
            there(image_features),
            there(text_features),
            scale,
            None if anchors is None else there(anchors[0]),
            None if anchors is None else there(anchors[1]),
            first_row,
            None if reference_image is None else there(constant(reference_image)),
            None if reference_text is None else there(constant(reference_text)),
            home,
        )

    @property
    def inputs(self) -> Inputs:
        """What takes a gradient."""
        return Inputs(self.image, self.text, self.image_anchors, self.text_anchors, self.scale)

    @property
    def anchors(self) -> int:
        """How many rows have lists here."""
        return len(self.image if self.image_anchors is None else self.image_anchors)

    @property
    def has_teacher(self) -> bool:
        """Whether the lists are ranked by a teacher's features."""
        return self.reference_image is not None or self.reference_text is not None

    @property
    def positives(self) -> Tensor:
        """``[n]``: the column of every anchor's own pair."""
        return torch.arange(self.first_row, self.first_row + self.anchors, device=self.image.device)

    def nan_unless_finite(self, weights: Tensor) -> Tensor:
        """The weights; NaN where a feature is not finite or a product could overflow, as the loss is then."""
        return nan_unless_finite(weights, self.image, self.text, self.reference_image, self.reference_text)

    def nan_beyond(self, largest_score: float, weights: Tensor) -> Tensor:
        """The weights; NaN where a feature is not finite or a score s·c may be beyond ±``largest_score``."""
        if self.has_teacher:
            weights = nan_unless_finite(weights, self.reference_image, self.reference_text)
        norms = (torch.linalg.vector_norm(x, dim=-1) for x in (self.image, self.text))
        largest = torch.maximum(*norms).amax()
        return weights.where(largest.square() * self.scale.abs() <= largest_score, torch.nan)

    def matrices(self, names: Sequence[Name]) -> list[Matrix]:
        """Some of the batch's four matrices."""
        found = []
        for name in names:
            anchors, items = _FACTORS[name]
            if self.image_anchors is None:
                anchors = anchors.removesuffix("_anchors")
            found.append(Matrix(name, getattr(self, anchors), getattr(self, items), (anchors, items)))
        return found

    def references(self, names: Sequence[Name]) -> list[Matrix]:
        """What the lists of some matrices are ranked by: each by its partner, or by a teacher.

        A teacher ranks S by its own S' and R by R', I by I' and X by X'. With the features of one modality
        alone it ranks both I and X by the matrix of that modality, since their items are the same pairs.
        """
        if not self.has_teacher:
            return self.matrices([PARTNER[name] for name in names])
        rows = slice(self.first_row, self.first_row + self.anchors)
        found = []
        for name in names:
            factors = [f"reference_{factor.removesuffix('_anchors')}" for factor in _FACTORS[name]]
            anchors, items = (getattr(self, factor) for factor in factors)
            if anchors is None or items is None:
                factors = ["reference_image" if self.reference_text is None else "reference_text"] * 2
                anchors = items = getattr(self, factors[0])
            found.append(Matrix(name, anchors[rows], items, (factors[0], factors[1])))
        return found

    def first_equal(
        self, matrix: Matrix, find: Callable[[Tensor], Tensor | None] = first_equal
    ) -> Tensor | None:
        """``[N]``: the first item equal to item j of one of the references; None where no two are equal."""
        items = matrix.factors[1]
        if items not in self._first_equal:
            self._first_equal[items] = find(matrix.items)
        return self._first_equal[items]

    def exact_reference(self, matrix: Matrix, cosines: Tensor) -> Tensor:
        """Rows of cosines as a reference: no gradient, equal items tied exactly whatever the rounding."""
        equal = self.first_equal(matrix)
        return cosines.detach() if equal is None else cosines.detach()[:, equal]

    def symmetric_reference(self, matrix: Matrix, cosines: Tensor) -> Tensor:
        """The whole of I or X as the reference of a batch list: its structural ties are made exact.

        C_ij = C_ji is taken from the upper triangle, and the similarity of two equal items, an item and
        itself among them, is the square of their norm, which is not taken from the matrix product. Rows whose
        norm is within 1 % of 1 count as unit-norm: among them it is one value, the largest of their squares.
        """
        upper = cosines.detach().triu()
        reference = upper + upper.triu(1).T
        equal = self.first_equal(matrix)
        if equal is None:
            equal = torch.arange(len(matrix.items), device=upper.device)
        reference = reference[equal][:, equal]
        squares = matrix.items.detach().double().square().sum(-1)
        is_unit = (squares.sqrt() - 1).abs() <= _UNIT
        unit = squares.where(is_unit, 0.0).amax()
        squares = torch.where(is_unit, unit, squares).to(reference.dtype)
        return torch.where(equal[:, None] == equal, squares[:, None], reference)


def constant(x: Tensor) -> Tensor:
    """Without a graph; a copy of what was made in inference mode, since autograd keeps no such tensor."""
    # A compiler cannot ask.
    return x.detach().clone() if torch.compiler.is_compiling() or x.is_inference() else x.detach()


def scalar(x: Tensor | float, device: torch.device) -> Tensor:
    """A number, or a tensor of one element, as a tensor without dimensions."""
    if isinstance(x, Tensor):
        return x.reshape(()) if x.dim() else x
    # Filled in on the device: to copy a number to it would make the host wait.
    return torch.full((), x, dtype=dtype_of_numbers(device), device=device)


def other_items(own: Tensor, n: int) -> Tensor:
    """The columns of a matrix's rows without each row's own: ``[len(own), n − 1]``.

    Example:
        >>> other_items(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    column = torch.arange(n - 1, device=own.device)
    return column + (column >= own[:, None])
