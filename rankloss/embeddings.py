"""From two batches of embeddings to the pairs of similarity lists that a rank term compares.

Notation: V, T are image and text features, s the scale. The cross-modal term compares S = s·V·Tᵀ with
R = s·T·Vᵀ, the in-modal term I = s·V·Vᵀ with X = s·T·Tᵀ, row by row. A matrix is described by its anchors
(which rows), its items (which columns) and which items are equal; nothing here is multiplied out until asked.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rankloss.options import RankOptions
from rankloss.ties import first_occurrence, row_hashes

__all__ = [
    "Embeddings",
    "Lists",
    "Similarity",
    "Term",
    "arithmetic_dtype",
    "check_features",
    "other_items",
    "scores_from",
]

Term = Literal["cross_modal", "in_modal"]


@dataclass(frozen=True)
class Similarity:
    """The matrix of cosines of n anchors with N items."""

    anchors: Tensor  # [n, D]
    items: Tensor  # [N, D]
    first_equal_item: Tensor | None  # [N]: the first item equal to item j; None where no two are equal
    first_equal_anchor: Tensor | None  # [n]: likewise among the anchors, where they are the whole batch

    def rows(self, rows: slice) -> Similarity:
        """The same matrix, some of its rows."""
        return Similarity(self.anchors[rows], self.items, self.first_equal_item, None)

    def cosines(self) -> Tensor:
        """``[n, N]``."""
        return self.anchors @ self.items.T

    def reference(self, cosines: Tensor, *, canonical_anchors: bool = False) -> Tensor:
        """The cosines as a reference: no gradient, equal items tied exactly whatever the rounding."""
        reference = cosines.detach()
        if canonical_anchors and self.first_equal_anchor is not None:
            reference = reference[self.first_equal_anchor]
        if self.first_equal_item is not None:
            reference = reference[:, self.first_equal_item]
        return reference

    def symmetric_reference(self, cosines: Tensor) -> Tensor:
        """The reference of a batch list where anchors and items are the same: its structural ties made exact.

        C_ij = C_ji is taken from the upper triangle, and an item's similarity with itself, or with its
        equal, from the largest diagonal entry: one value for the whole batch.
        """
        upper = cosines.detach().triu()
        reference = upper + upper.triu(1).T
        equal = torch.arange(len(self.items), device=self.items.device)
        if self.first_equal_item is not None:
            equal = self.first_equal_item
            reference = reference[equal][:, equal]
        return reference.masked_fill(equal[:, None] == equal, cosines.detach().diagonal().amax())


@dataclass(frozen=True)
class Lists:
    """Two similarity matrices whose rows rank the same things, and are to agree."""

    first: Similarity
    second: Similarity


@dataclass(frozen=True)
class Embeddings:
    """A batch's checked embeddings, in the dtype of the arithmetic.

    ``image`` and ``text`` hold the items that lists are made of. ``image_anchors`` and ``text_anchors``,
    where they are not None, hold the rows that have lists here (the local ones of a distributed batch).
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    image_anchors: Tensor | None = None
    text_anchors: Tensor | None = None
    _known: dict[str, Tensor | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        image_anchors: Tensor | None = None,
        text_anchors: Tensor | None = None,
    ) -> Embeddings:
        """Check the features and bring them to float32, or to float64 if either is that."""
        check_features(image_features, text_features)
        dtype = arithmetic_dtype(image_features, text_features)
        image, text = image_features.to(dtype), text_features.to(dtype)
        return cls(
            image,
            text,
            _scale(logit_scale, image),
            None if image_anchors is None else image_anchors.to(dtype),
            None if text_anchors is None else text_anchors.to(dtype),
        )

    @property
    def anchors(self) -> int:
        """How many rows have lists here."""
        return len(self.image if self.image_anchors is None else self.image_anchors)

    @property
    def first_equal_image(self) -> Tensor | None:
        """``[N]``: the first image equal to image j; None where no two are equal."""
        return self._once("image", self.image)

    @property
    def first_equal_text(self) -> Tensor | None:
        """``[N]``: the first text equal to text j; None where no two are equal."""
        return self._once("text", self.text)

    def _once(self, name: str, features: Tensor) -> Tensor | None:
        # Not a cached_property: up to Python 3.11 that takes a lock, where a compiler would stop.
        if name not in self._known:
            self._known[name] = _first_equal(features)
        return self._known[name]

    def lists(self, term: Term) -> Lists:
        """The two matrices that a term compares."""
        v, t = self.image, self.text
        image, text = self.first_equal_image, self.first_equal_text
        rows_v = v if self.image_anchors is None else self.image_anchors
        rows_t = t if self.text_anchors is None else self.text_anchors
        if term == "cross_modal":
            return Lists(Similarity(rows_v, t, text, image), Similarity(rows_t, v, image, text))
        return Lists(Similarity(rows_v, v, image, image), Similarity(rows_t, t, text, text))

    @property
    def nan_unless_finite(self) -> Tensor:
        """1, or NaN where a feature is NaN or infinite: a factor that no plausible value survives."""
        finite = self.image.detach().isfinite().all() & self.text.detach().isfinite().all()
        return torch.where(finite, 1.0, math.nan).to(self.image.dtype)


def arithmetic_dtype(*features: Tensor) -> torch.dtype:
    """Float32, or float64 if any of the features is that."""
    dtypes = (x.dtype for x in features)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def check_features(image_features: Tensor, text_features: Tensor, *, min_pairs: int = 2) -> None:
    """Raise a ValueError that names the argument unless both are floating ``[N, D]`` of one shape.

    N must be at least ``min_pairs``: a list needs two items, but a process may hold one of many.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
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


def scores_from(cosines: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The x of the formula: scaled similarities under worth ``exp``, plain cosines under the others."""
    return scale * cosines if options.worth == "exp" else cosines


def other_items(own: Tensor, n: int) -> Tensor:
    """The columns of a matrix's rows without each row's own: ``[len(own), n − 1]``.

    Example:
        >>> other_items(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    column = torch.arange(n - 1, device=own.device)
    return column + (column >= own[:, None])


def _scale(logit_scale: Tensor | float, like: Tensor) -> Tensor:
    scale = torch.as_tensor(logit_scale, dtype=like.dtype)
    if scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number; got shape {tuple(scale.shape)}")
    if _may_look_at(scale) and bool(scale <= 0):
        raise ValueError(
            f"logit_scale must be positive (it is the multiplier, not its log); got {scale.item():g}"
        )
    return scale.reshape(()).to(like.device)


def _first_equal(features: Tensor) -> Tensor | None:
    """:func:`first_occurrence`, or None where no two rows are equal and knowing it costs no wait."""
    if _may_look_at(features) and len(row_hashes(features).unique()) == len(features):
        return None
    return first_occurrence(features)


def _may_look_at(x: Tensor) -> bool:
    """Whether Python may branch on a value: with an accelerator every step would wait, a compiler stop."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
