"""A batch of checked features, and the similarity matrices whose rows the rank terms compare.

Notation: V, T are image and text features, s the scale; S = s·V·Tᵀ, R = s·T·Vᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ. The
cross-modal term compares S with R, the in-modal term I with X, row by row. A matrix is described by its
anchors (rows) and its items (columns).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rankloss.equal_rows import first_equal
from rankloss.precision import arithmetic_device, arithmetic_dtype, constant, product, scalar

Term = Literal["cross_modal", "in_modal"]

RANK_TERMS: tuple[Term, Term] = ("cross_modal", "in_modal")

_FACTORS = {
    "cross_modal": (("image_anchors", "text"), ("text_anchors", "image")),
    "in_modal": (("image_anchors", "image"), ("text_anchors", "text")),
}


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
        factors: the names of both among :class:`Inputs`.
    """

    anchors: Tensor
    items: Tensor
    factors: tuple[str, str]

    def cosines(self) -> Tensor:
        """The whole matrix, ``[n, N]``, differentiable any number of times, in full precision."""
        return product(self.anchors, self.items.T)


@dataclass(frozen=True)
class Batch:
    """A batch's features, in the dtype of the arithmetic and on its device.

    Attributes:
        inputs: ``image`` and ``text``, ``[N, D]``, the items of all lists; ``image_anchors`` and
            ``text_anchors``, ``[n, D]``, the rows that have lists here, the local ones of a distributed
            batch, or None where every item is an anchor; the scale s.
        first_row: the place of the first anchor among the items.
        reference_image: ``[N, D']``, a teacher's features of the items, by which the lists are ranked, or
            None.
        reference_text: likewise.
        home: the device of the features as they were given, to which the terms go.
    """

    inputs: Inputs
    first_row: int = 0
    reference_image: Tensor | None = None
    reference_text: Tensor | None = None
    home: torch.device | None = None

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

        A teacher's features, whatever their dtype, are brought to the same dtype and lose their graph.
        """
        dtype, home = arithmetic_dtype(image_features, text_features), image_features.device
        device = arithmetic_device(home)

        def there(x: Tensor | None) -> Any:
            return None if x is None else x.resolve_neg().to(device, non_blocking=x.dim() == 0).to(dtype)

        features = (image_features, text_features, *(anchors or (None, None)), scalar(logit_scale, home))
        image, text = (None if x is None else there(constant(x)) for x in (reference_image, reference_text))
        return cls(Inputs(*map(there, features)), first_row, image, text, home)

    @property
    def items(self) -> int:
        """The length of a list, N."""
        return len(self.inputs.image)

    @property
    def anchors(self) -> int:
        """The number of rows that have lists here, n."""
        return self.items if self.inputs.image_anchors is None else len(self.inputs.image_anchors)

    @property
    def positives(self) -> Tensor:
        """``[n]``: the column of every anchor's own pair."""
        return torch.arange(self.first_row, self.first_row + self.anchors, device=self.inputs.image.device)

    @property
    def has_teacher(self) -> bool:
        """True where a teacher's features rank the lists."""
        return self.reference_image is not None or self.reference_text is not None

    @property
    def features(self) -> list[Tensor]:
        """The features of all items, a teacher's among them."""
        found = self.inputs.image, self.inputs.text, self.reference_image, self.reference_text
        return [x for x in found if x is not None]

    def matrices(self, term: Term) -> tuple[Matrix, Matrix]:
        """The two matrices of a term, with images and with texts as anchors: S and R, or I and X."""
        given = self.inputs._asdict()
        found = []
        for anchors, items in _FACTORS[term]:
            if given[anchors] is None:
                anchors = anchors.removesuffix("_anchors")
            found.append(Matrix(given[anchors], given[items], (anchors, items)))
        return found[0], found[1]

    @property
    def ranked_by(self) -> dict[str, Tensor]:
        """The features of the items that give the order, by modality: the batch's own, or a teacher's.

        A teacher of one modality ranks both, since the items of a list are the same pairs.
        """
        image, text = self.reference_image, self.reference_text
        if image is None and text is None:
            return {"image": self.inputs.image, "text": self.inputs.text}
        return {"image": text if image is None else image, "text": image if text is None else text}  # type: ignore[dict-item]

    def references(self, term: Term) -> tuple[Matrix, Matrix]:
        """The matrices by which the two of a term are ranked.

        Without a teacher each is ranked by the other; a teacher ranks S by its own S' and R by R', I by I'
        and X by X'.
        """
        if not self.has_teacher:
            of_images, of_texts = self.matrices(term)
            return of_texts, of_images
        features, rows = self.ranked_by, slice(self.first_row, self.first_row + self.anchors)
        names = [(anchors.removesuffix("_anchors"), items) for anchors, items in _FACTORS[term]]
        of_images, of_texts = (Matrix(features[a][rows], features[b], (a, b)) for a, b in names)
        return of_images, of_texts

    @functools.cached_property
    def first_equal(self) -> dict[str, Tensor | None]:
        """``[N]`` by modality: the first reference item that equals item j; None where no two are equal."""
        return {modality: first_equal(x) for modality, x in self.ranked_by.items()}

    def exact_reference(self, matrix: Matrix, cosines: Tensor) -> Tensor:
        """Rows of cosines as a reference: no gradient, equal items tied exactly whatever the rounding."""
        equal = self.first_equal[matrix.factors[1]]
        return cosines.detach() if equal is None else cosines.detach().index_select(-1, equal)


def other_items(own: Tensor, n: int) -> Tensor:
    """The columns of a matrix's rows without each row's own: ``[len(own), n − 1]``.

    Example:
        >>> other_items(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    column = torch.arange(n - 1, device=own.device)
    return column + (column >= own[:, None])
