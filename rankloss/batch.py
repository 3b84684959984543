"""A batch of checked features, and the four similarity matrices whose rows the rank terms compare.

Notation: V, T are image and text features, s the scale; S = s·V·Tᵀ, R = s·T·Vᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ. The
cross-modal term compares S with R, the in-modal term I with X, row by row. A matrix is described by its
anchors (rows) and its items (columns); it is multiplied out block by block, or as a whole in
:mod:`rankloss.dense`.

Ties have to be exact for a loss to be independent of the order in which items arrive. A matrix product does
not give that for free: the columns of two identical captions can come out a rounding apart, because the
kernel sums edge columns in another order than the rest. So equal rows of features are recognised from their
bits, before any product is taken, and an item's similarity as a reference is that of the first item equal
to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rankloss.checks import (
    check_device,
    check_features,
    check_reference_features,
    check_scale,
    refuse_forward_mode,
)
from rankloss.equal_rows import first_equal, first_equal_in_kernel
from rankloss.precision import arithmetic_dtype, dtype_of_numbers, full_precision, nan_unless_finite

__all__ = [
    "MATRICES",
    "Batch",
    "Inputs",
    "Matrix",
    "Term",
    "anchors_and_items",
    "other_items",
]

Term = Literal["cross_modal", "in_modal"]

MATRICES = ("S", "R", "I", "X")
"""In the order in which everything that holds one thing per matrix holds it."""

_REFERENCES = ("reference_image_features", "reference_text_features")
_UNIT = 0.01  # how far the norm of a row may be from 1 for the row to count as unit-norm


class Matrix(NamedTuple):
    """The cosines of n anchors with N items."""

    name: Literal["S", "R", "I", "X"]
    anchors: Tensor  # [n, D]
    items: Tensor  # [N, D]
    first_equal: Tensor | None  # [N]: the first item equal to item j; None where no two are equal

    @property
    def term(self) -> Term:
        """The term that compares it."""
        return "cross_modal" if self.name in "SR" else "in_modal"

    def cosines(self) -> Tensor:
        """All of them: ``[n, N]``, differentiable any number of times, whatever autocast asks for."""
        cosines: Tensor = _product(self.anchors, self.items.T)
        return cosines

    def reference(self, cosines: Tensor) -> Tensor:
        """Rows of cosines as a reference: no gradient, equal items tied exactly whatever the rounding."""
        reference = cosines.detach()
        return reference if self.first_equal is None else reference[:, self.first_equal]

    def symmetric_reference(self, cosines: Tensor) -> Tensor:
        """The whole of I or X as the reference of a batch list: its structural ties are made exact.

        C_ij = C_ji is taken from the upper triangle, and the similarity of two equal items, an item and
        itself among them, is the square of their norm, which is not taken from the matrix product. Rows whose
        norm is within 1 % of 1 count as unit-norm: among them it is one value, the largest of their squares.
        """
        upper = cosines.detach().triu()
        reference = upper + upper.triu(1).T
        equal = torch.arange(len(self.items), device=self.items.device)
        if self.first_equal is not None:
            equal = self.first_equal
            reference = reference[equal][:, equal]
        squares = self.items.detach().double().square().sum(-1)
        is_unit = (squares.sqrt() - 1).abs() <= _UNIT
        unit = squares.where(is_unit, 0.0).amax()
        squares = torch.where(is_unit, unit, squares).to(reference.dtype)
        return torch.where(equal[:, None] == equal, squares[:, None], reference)


@torch.library.custom_op("rankloss::product", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: an operator, so that a backward pass under autocast differentiates in full precision too."""
    with full_precision(a.device):
        return a @ b


@_product.register_fake
def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _differentiate_product(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (a, b), (by_a, by_b) = ctx.saved_tensors, ctx.needs_input_grad
    return _product(g, b.T) if by_a else None, _product(a.T, g) if by_b else None


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


_product.register_autograd(_differentiate_product, setup_context=_keep_factors)


class Inputs(NamedTuple):
    """What a batch's terms are differentiated by: the tensors, or one thing for each of them."""

    image: Tensor | None
    text: Tensor | None
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor | None


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
    home: torch.device | None = None
    reference_image: Tensor | None = None
    reference_text: Tensor | None = None
    _first_equal: dict[tuple[str, ...], list[Tensor | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        image_anchors: Tensor | None = None,
        text_anchors: Tensor | None = None,
        first_row: int = 0,
        reference_image: Tensor | None = None,
        reference_text: Tensor | None = None,
    ) -> Batch:
        """Check the features and bring them to float32, or to float64 if either is that.

        A teacher's features, whatever their dtype, are brought to the same dtype and lose their graph. On
        MPS, which has no float64, everything is brought to the CPU.

        Raises:
            RuntimeError: in forward-mode differentiation.
            TypeError, ValueError: as :func:`check_features`; for a scale that is not one positive number.
        """
        check_features(image_features, text_features)
        dtype = arithmetic_dtype(image_features, text_features)
        home = image_features.device
        device = torch.device("cpu") if home.type == "mps" else home
        for name, anchors in (("image_anchors", image_anchors), ("text_anchors", text_anchors)):
            if anchors is not None:
                check_device(name, anchors, image_features)
        teacher = (reference_image, reference_text)
        for name, reference in zip(_REFERENCES, teacher, strict=True):
            if reference is not None:
                check_reference_features(name, reference, image_features)
        batch = cls(
            image_features.to(device).to(dtype),
            text_features.to(device).to(dtype),
            _scale(logit_scale, image_features).to(device, non_blocking=True).to(dtype),
            None if image_anchors is None else image_anchors.to(device).to(dtype),
            None if text_anchors is None else text_anchors.to(device).to(dtype),
            first_row,
            home,
            *(None if x is None else x.detach().to(device).to(dtype) for x in teacher),
        )
        refuse_forward_mode(*batch.inputs)
        return batch

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
    def own(self) -> Tensor:
        """``[n]``: the column of every anchor's own pair."""
        return torch.arange(self.first_row, self.first_row + self.anchors, device=self.image.device)

    def matrices(
        self, term: Term, *, are_references: bool = True, in_kernel: bool = False
    ) -> tuple[Matrix, Matrix]:
        """The two matrices that a term compares: S and R, or I and X.

        Without ``are_references`` no lists are ranked by them, and equal items are not looked for;
        ``in_kernel`` says that :mod:`rankloss.kernels` serves, and looks for them there.
        """
        are_local = self.image_anchors is not None
        (images, items_1), (texts, items_2) = anchors_and_items(term, self.inputs, are_local)
        v, t = self._equal("image", "text", in_kernel=in_kernel) if are_references else (None, None)
        if term == "cross_modal":
            return Matrix("S", images, items_1, t), Matrix("R", texts, items_2, v)
        return Matrix("I", images, items_1, v), Matrix("X", texts, items_2, t)

    def references(
        self, term: Term, matrices: tuple[Matrix, Matrix], *, in_kernel: bool = False
    ) -> tuple[Matrix, Matrix]:
        """What the lists of a term's two matrices are ranked by: each by the other, or by a teacher.

        A teacher ranks S by its own S' and R by R', I by I' and X by X'. With the features of one modality
        alone it ranks both I and X by the matrix of that modality, since their items are the same pairs.
        """
        if not self.has_teacher:
            return matrices[1], matrices[0]
        rows = slice(self.first_row, self.first_row + self.anchors)
        v, t = self.reference_image, self.reference_text
        if v is not None and t is not None:
            of_v, of_t = self._equal("reference_image", "reference_text", in_kernel=in_kernel)
            if term == "cross_modal":
                return Matrix("S", v[rows], t, of_t), Matrix("R", t[rows], v, of_v)
            return Matrix("I", v[rows], v, of_v), Matrix("X", t[rows], t, of_t)
        name: Literal["I", "X"] = "I" if t is None else "X"
        of_one = v if t is None else t
        assert of_one is not None
        (equal,) = self._equal("reference_image" if t is None else "reference_text", in_kernel=in_kernel)
        by_one = Matrix(name, of_one[rows], of_one, equal)
        return by_one, by_one

    def _equal(self, *names: str, in_kernel: bool) -> list[Tensor | None]:
        # Not a cached_property: up to Python 3.11 that takes a lock, where a compiler would stop.
        if names not in self._first_equal:
            features = [getattr(self, name) for name in names]
            find = first_equal_in_kernel if in_kernel else first_equal
            self._first_equal[names] = find(*features)
        return self._first_equal[names]

    def nan_unless_finite(self, weights: Tensor) -> Tensor:
        """The weights if all features are finite and no product can overflow, else NaN."""
        return nan_unless_finite(weights, self.image, self.text, self.reference_image, self.reference_text)


def anchors_and_items(term: Term, of: Inputs, are_local: bool) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """What belongs to the anchors and to the items of S and R, or of I and X."""
    rows_v, rows_t = (of.image_anchors, of.text_anchors) if are_local else (of.image, of.text)
    if term == "cross_modal":
        return (rows_v, of.text), (rows_t, of.image)
    return (rows_v, of.image), (rows_t, of.text)


def _scale(logit_scale: Tensor | float, features: Tensor) -> Tensor:
    check_scale(logit_scale, features)
    if isinstance(logit_scale, Tensor):
        return logit_scale.reshape(())
    # Filled in on the device: to copy a number to it would make the host wait.
    return torch.full((), logit_scale, dtype=dtype_of_numbers(features.device), device=features.device)


def other_items(own: Tensor, n: int) -> Tensor:
    """The columns of a matrix's rows without each row's own: ``[len(own), n − 1]``.

    Example:
        >>> other_items(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    column = torch.arange(n - 1, device=own.device)
    return column + (column >= own[:, None])
