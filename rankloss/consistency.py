r"""The two rank terms as functions of embeddings.

With S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ, and C the NLL of a matrix's lists (see
:func:`rankloss.plackett_luce_nll`),

    cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)].

Similarities, order and sums are computed in float32 at least, whatever the features' dtype or an enclosing
autocast region asks for: half-precision similarities would make ties of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from rankloss import dense, streaming
from rankloss.embeddings import Embeddings, Term
from rankloss.plackett_luce import (
    Discount,
    ListOptions,
    Ties,
    Worth,
    check_choice,
    check_count,
    random_shuffle,
)

__all__ = ["ConsistencyOptions", "ListsOption", "Reduction", "cross_modal", "in_modal", "rank_term"]

ListsOption = Literal["row", "batch"]
Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class ConsistencyOptions:
    """Which lists a term is made of and how their values are put together, checked once."""

    lists: ListsOption = "row"
    reduction: Reduction = "mean"
    chunk_size: int | None = None
    likelihood: ListOptions = field(default_factory=ListOptions)

    def __post_init__(self) -> None:
        check_choice("lists", self.lists, get_args(ListsOption))
        check_choice("reduction", self.reduction, get_args(Reduction))
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)


def rank_term(term: Term, embeddings: Embeddings, options: ConsistencyOptions) -> Tensor:
    """One term of checked embeddings: a scalar, or ``[n]``, a value per anchor, with ``reduction="none"``.

    An anchor's value is the mean of its lists' NLL over the two directions. ``"mean"`` averages the anchors
    and divides by the N items of a list; ``"sum"`` is N² times that, which is the plain sum where every
    item is an anchor, and keeps the balance between terms where a process holds a share of the anchors
    only.
    """
    n = len(embeddings.image)
    anchors = n if embeddings.image_anchors is None else len(embeddings.image_anchors)
    anchor_weight = {"mean": 1 / (anchors * n), "sum": n / anchors, "none": None}[options.reduction]
    device = embeddings.image.device
    with torch.autocast(device_type=device.type, enabled=False):
        if options.lists == "batch":
            value = dense.batch_list_nll(embeddings, term, options.likelihood)
            if anchor_weight is not None:
                value = value.sum() * anchor_weight
        else:
            value = streaming.row_lists_nll(
                embeddings,
                term,
                options.likelihood,
                (
                    random_shuffle(n, device, options.likelihood),
                    random_shuffle(n, device, options.likelihood),
                ),
                chunk_size=options.chunk_size,
                anchor_weight=anchor_weight,
            )
        return value * embeddings.nan_unless_finite


def cross_modal(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float = 1.0,
    *,
    lists: ListsOption = "row",
    worth: Worth = "exp",
    ties: Ties = "shared",
    discount: Discount | None = None,
    top_k: int | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """``½[C(S | R) + C(R | S)]``: the image's ranking of the texts against the text's ranking of the images.

    Arguments, shapes and errors as in :class:`rankloss.RankConsistency`.

    Example:
        >>> v = torch.eye(3)
        >>> round(cross_modal(v, v, 10.0).item(), 4)  # perfect pairs; the two wrong items of a list are tied
        0.4621
    """
    options = ConsistencyOptions(lists, reduction, chunk_size, ListOptions(worth, ties, discount, top_k))
    return rank_term("cross_modal", Embeddings.of(image_features, text_features, logit_scale), options)


def in_modal(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float = 1.0,
    *,
    lists: ListsOption = "row",
    worth: Worth = "exp",
    ties: Ties = "shared",
    discount: Discount | None = None,
    top_k: int | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """``½[C(I | X) + C(X | I)]``: the ranking of the images among themselves against that of their texts.

    Arguments, shapes and errors as in :class:`rankloss.RankConsistency`.

    Example:
        >>> v = torch.eye(3)
        >>> round(in_modal(v, v, 10.0).item(), 4)
        0.4621
    """
    options = ConsistencyOptions(lists, reduction, chunk_size, ListOptions(worth, ties, discount, top_k))
    return rank_term("in_modal", Embeddings.of(image_features, text_features, logit_scale), options)
