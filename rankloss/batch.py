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

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from rankloss import kernels

__all__ = [
    "MATRICES",
    "Batch",
    "Inputs",
    "Matrix",
    "Term",
    "anchors_and_items",
    "arithmetic_dtype",
    "check_bias",
    "check_device",
    "check_features",
    "check_is_number",
    "check_is_tensor",
    "check_reference_features",
    "check_scale",
    "dtype_of_numbers",
    "first_occurrence",
    "full_precision",
    "kind_of",
    "may_look_at",
    "nan_unless_finite",
    "other_items",
    "refuse_forward_mode",
    "row_hashes",
]

Term = Literal["cross_modal", "in_modal"]

MATRICES = ("S", "R", "I", "X")
"""In the order in which everything that holds one thing per matrix holds it."""

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


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Outside any autocast region, which would turn products into half precision."""
    if device.type == "meta":  # computes nothing, and knows no autocast
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


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
            find = _first_equal_in_kernel if in_kernel else _first_equal
            self._first_equal[names] = find(*features)
        return self._first_equal[names]

    def nan_unless_finite(self, weights: Tensor) -> Tensor:
        """The weights if all features are finite and no product can overflow, else NaN."""
        return nan_unless_finite(weights, self.image, self.text, self.reference_image, self.reference_text)


def nan_unless_finite(weights: Tensor, *features: Tensor | None) -> Tensor:
    """The weights if all features are finite and no product can overflow, else NaN, as the loss is then."""
    norms = (torch.linalg.vector_norm(x.detach(), math.inf) for x in features if x is not None)
    largest = functools.reduce(torch.maximum, norms)
    # The cube overflows before D·largest² does. 0 · ∞ and 0 · NaN are NaN.
    return torch.addcmul(weights, weights, largest**3, value=0)


def anchors_and_items(term: Term, of: Inputs, are_local: bool) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """What belongs to the anchors and to the items of S and R, or of I and X."""
    rows_v, rows_t = (of.image_anchors, of.text_anchors) if are_local else (of.image, of.text)
    if term == "cross_modal":
        return (rows_v, of.text), (rows_t, of.image)
    return (rows_v, of.image), (rows_t, of.text)


# --- checks -----------------------------------------------------------------------------------------------


def arithmetic_dtype(*features: Tensor) -> torch.dtype:
    """Float32, or float64 if any of the features is that."""
    dtypes = (x.dtype for x in features)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def dtype_of_numbers(device: torch.device) -> torch.dtype:
    """What numbers beside features are kept in: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_features(image_features: Tensor, text_features: Tensor, *, min_pairs: int = 2) -> None:
    """Raise an error that names the argument unless both are floating ``[N, D]`` of one shape and device.

    N must be at least ``min_pairs``: a list needs two items, but a process may hold one of many.

    Raises:
        TypeError: for features that are no tensor.
        ValueError: for all else.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        check_is_tensor(name, features)
        if features.dim() != 2:
            raise ValueError(f"{name} must have shape [N, D]; got {tuple(features.shape)}")
        if not features.is_floating_point():
            raise ValueError(f"{name} must be floating point; got {features.dtype}")
    if image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must have one shape [N, D]; "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if image_features.shape[0] < min_pairs or image_features.shape[1] < 1:
        pairs = "one pair" if min_pairs == 1 else "two pairs"
        raise ValueError(
            f"image_features and text_features must hold at least {pairs}; "
            f"got shape {tuple(image_features.shape)}"
        )
    check_device("text_features", text_features, image_features)


_REFERENCES = ("reference_image_features", "reference_text_features")


def check_reference_features(name: str, reference: Tensor, image_features: Tensor) -> None:
    """Raise an error that names the argument unless it is floating ``[N, D']``, on the features' device.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for all else.
    """
    check_is_tensor(name, reference)
    if reference.dim() != 2 or reference.shape[0] != len(image_features) or reference.shape[1] < 1:
        raise ValueError(
            f"{name} must have shape [N, D'] with one row per pair, N = {len(image_features)}; "
            f"got {tuple(reference.shape)}"
        )
    if not reference.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {reference.dtype}")
    check_device(name, reference, image_features)


def check_is_tensor(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {kind_of(value)}")


def check_is_number(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless it is a tensor or a number of Python's or NumPy's."""
    if not isinstance(value, (Tensor, float, int, np.number)):
        raise TypeError(f"{name} must be a float or a torch.Tensor; got {kind_of(value)}")


def kind_of(value: object) -> str:
    """The type of a value, as an error message shows it."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_device(name: str, x: Tensor, like: Tensor, like_name: str = "image_features") -> None:
    """Raise a ValueError that names the argument unless both tensors are on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {x.device}")


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise a RuntimeError in forward-mode differentiation, in which operators of ours would give 0."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "this loss has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use "
            "reverse mode, as torch.autograd.grad does"
        )


def may_look_at(x: Tensor) -> bool:
    """Whether Python may branch on a value.

    On an accelerator this would synchronise every step; under torch.compile it would break the graph; a fake
    tensor has no value.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def check_scale(logit_scale: Tensor | float, features: Tensor) -> None:
    """Raise an error unless the scale is one positive number; its value is looked at where that is free.

    Raises:
        TypeError: as :func:`check_is_number`.
        ValueError: for all else.
    """
    check_is_number("logit_scale", logit_scale)
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1 or logit_scale.dim() > 2:  # more would not broadcast with features
            raise ValueError(f"logit_scale must be one number; got shape {tuple(logit_scale.shape)}")
        if logit_scale.is_meta and not features.is_meta:
            raise ValueError(f"logit_scale must be on {features.device}, as image_features; got meta")
        value = _value_of(logit_scale) if may_look_at(logit_scale) else None
    else:
        value = None if torch.compiler.is_compiling() else float(logit_scale)
    if value is not None and value <= 0:
        raise ValueError(f"logit_scale must be positive (it is the multiplier, not its log); got {value:g}")


def check_bias(logit_bias: Tensor | float | None, features: Tensor) -> None:
    """Raise an error unless the bias is one number, or None.

    Raises:
        TypeError: as :func:`check_is_number`.
        ValueError: for a tensor of several numbers, or on another device.
    """
    if isinstance(logit_bias, Tensor):
        if logit_bias.numel() != 1:
            raise ValueError(f"logit_bias must be one number; got shape {tuple(logit_bias.shape)}")
        if not (logit_bias.dim() == 0 and logit_bias.device.type == "cpu"):  # torch takes such one anywhere
            check_device("logit_bias", logit_bias, features)
    elif logit_bias is not None:
        check_is_number("logit_bias", logit_bias)


def _value_of(x: Tensor) -> float | None:
    """The value of a scalar; None where there is none to read, as under vmap."""
    try:
        return float(x.item())
    except RuntimeError:
        return None


def _scale(logit_scale: Tensor | float, features: Tensor) -> Tensor:
    check_scale(logit_scale, features)
    if isinstance(logit_scale, Tensor):
        return logit_scale.reshape(())
    # Filled in on the device: to copy a number to it would make the host wait.
    return torch.full((), logit_scale, dtype=dtype_of_numbers(features.device), device=features.device)


# --- equal rows -------------------------------------------------------------------------------------------

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_ROUNDS = 4  # of hashing, where rows that differ have had one hash
_FIRST_FACTOR = 1.3247179572447460  # squared, that of a first column: any number without a pattern


def other_items(own: Tensor, n: int) -> Tensor:
    """The columns of a matrix's rows without each row's own: ``[len(own), n − 1]``.

    Example:
        >>> other_items(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    column = torch.arange(n - 1, device=own.device)
    return column + (column >= own[:, None])


def first_occurrence(features: Tensor) -> Tensor:
    """Index of the first row that equals row i, for every i.

    It is i itself where the row is the first of its kind. A row that holds NaN equals no row.

    Args:
        features: ``[N, D]``, float32 or float64.

    Returns:
        Integer tensor of shape ``[N]``.

    Example:
        >>> first_occurrence(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
        [0, 1, 0]
    """
    (found,) = _first_equal(features)
    return torch.arange(len(features), device=features.device) if found is None else found


def _first_equal(*features: Tensor) -> list[Tensor | None]:
    """:func:`first_occurrence` of several matrices; None where no two rows are equal and a look tells so.

    Rows are compared through a 64-bit hash, and each match is confirmed on the values themselves, so rows
    that differ never count as equal. Where rows that differ have one hash, which is to be expected once in
    some 10⁹ batches, those behind the first might miss their equals; if a look is free, it is tried again
    with another hash. Memory is O(N·D), and an accelerator's host waits for nothing.
    """
    features = tuple(x.detach() for x in features)
    own = torch.arange(len(features[0]), device=features[0].device)
    looks = may_look_at(features[0])
    found: list[Tensor | None] = [None] * len(features)
    unsettled = list(range(len(features)))
    for salt in range(_ROUNDS if looks else 1):
        of_salt = {k: row_hashes(features[k], salt) for k in unsettled}
        if looks:
            of_salt = {k: h for k, h in of_salt.items() if len(h.unique()) < len(h)}
        if not of_salt:
            break
        unsettled, hashes = list(of_salt), torch.stack(list(of_salt.values()))
        ordered, order = hashes.sort(stable=True)  # stable: a group's first is its least
        candidates = order.gather(-1, torch.searchsorted(ordered, hashes))
        for k, candidate in zip(tuple(unsettled), candidates, strict=True):
            same = (features[k][candidate] == features[k]).all(-1)
            # Equal rows have one candidate, and so are confirmed all or none.
            first, before = torch.where(same, candidate, own), found[k]
            found[k] = first if before is None else torch.minimum(first, before)
            if looks and bool(same.all()):
                unsettled.remove(k)
    return found


def _first_equal_in_kernel(*features: Tensor) -> list[Tensor | None]:
    """The same on a GPU, from one pass over float32 features, with one hash."""
    hashes = torch.stack([kernels.hash_rows(x) for x in features])
    ordered, order = hashes.sort(stable=True)
    candidates = order.gather(-1, torch.searchsorted(ordered, hashes))
    return [kernels.confirm_equals(x, candidate) for x, candidate in zip(features, candidates, strict=True)]


def row_hashes(features: Tensor, salt: int = 0) -> Tensor:
    """A 64-bit hash of every row, ``[N]``; equal rows have equal ones, different salts different hashes.

    The bits of the entries, 32 at a time and read as integers, are multiplied by a number of their column in
    float64, and the bits of the products are summed in wrapping integer arithmetic, which gives one value
    whatever the order of summation. No step is arithmetic on the entries themselves, where a flushed
    subnormal would depend on the thread.
    """
    bits = features.detach().contiguous().view(_BITS[features.dtype])
    negative_zero = torch.iinfo(bits.dtype).min
    words = F.threshold(bits, negative_zero, 0).view(torch.int32)  # −0.0 equals 0.0
    # Roots, since no small multiples of them add up to the same; none is a multiple of another.
    columns = torch.arange(words.shape[1], dtype=torch.float64, device=words.device)
    factors = columns.add_(_FIRST_FACTOR + words.shape[1] * salt).sqrt_()
    return (words * factors).view(torch.int64).sum(-1)
