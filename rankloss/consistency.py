r"""The two rank terms as functions of embeddings.

With S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ, and C the NLL of a matrix's lists (see
:func:`rankloss.plackett_luce_nll`),

    cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)],

or one direction of each where the other modality's rankings are a fixed reference.

Similarities, order and sums are computed in float32 at least, whatever the features' dtype or an enclosing
autocast region asks for: half-precision similarities would make ties of neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloss import dense
from rankloss.embeddings import Embeddings, Term
from rankloss.options import RankOptions
from rankloss.plackett_luce import random_shuffle
from rankloss.row_lists import row_lists

__all__ = ["cross_modal", "in_modal", "weighted_terms"]


def weighted_terms(
    embeddings: Embeddings,
    options: RankOptions,
    weights: Tensor,
    *,
    contrastive: bool = False,
    cross_modal: bool = True,
    in_modal: bool = True,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP's cross-entropy and the two rank terms, each times its weight; one that is not wanted is zero.

    An anchor's rank term is the mean of its lists' NLL over the two directions. ``reduction="mean"`` averages
    the anchors and divides by the items of a list; ``"sum"`` is N² times that, which is the plain sum where
    every item is an anchor, and keeps the balance between terms where a process holds a share of the anchors
    only. The cross-entropy is always the mean over the anchors.

    Args:
        embeddings: the batch.
        options: of the rank terms.
        weights: ``[3]``, on the CPU, of the three terms.
        contrastive: whether the cross-entropy is wanted; only row lists of worth ``exp`` can carry it.
        cross_modal: whether the cross-modal term is wanted.
        in_modal: whether the in-modal term is wanted.
        first_row: the first anchor's own place among the items.
    """
    if options.lists == "row":
        n, device = len(embeddings.image), embeddings.image.device
        drawn = [random_shuffle(n, device, options) for _ in range(4)]
        shuffles = torch.stack([x for x in drawn if x is not None]) if options.ties == "random" else None
        wanted = (contrastive, cross_modal, in_modal)
        a, b, c = row_lists(embeddings, options, weights, wanted, shuffles, first_row)
        return a, b, c
    assert not contrastive
    n, device_type = len(embeddings.image), embeddings.image.device.type
    anchor_weight = options.anchor_weight(n, n)
    values = []
    terms: tuple[tuple[Term, bool], ...] = (("cross_modal", cross_modal), ("in_modal", in_modal))
    nan_unless_finite = embeddings.nan_unless_finite
    with torch.autocast(device_type=device_type, enabled=False):
        for k, (term, is_wanted) in enumerate(terms, 1):
            if not is_wanted:
                values.append(embeddings.image.new_zeros(n if options.reduction == "none" else ()))
                continue
            value = dense.batch_list_nll(embeddings, term, options)
            value = value if options.reduction == "none" else value.sum()
            weight = weights[k].to(value) * anchor_weight
            values.append(value * weight * nan_unless_finite)
    return embeddings.image.new_zeros(()), values[0], values[1]


def cross_modal(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0, **options: Any
) -> Tensor:
    """``½[C(S | R) + C(R | S)]``: the image's ranking of the texts against the text's ranking of the images.

    Arguments, shapes and errors as in :class:`rankloss.RankConsistency`.

    Example:
        >>> v = torch.eye(3)
        >>> round(cross_modal(v, v, 10.0).item(), 4)  # perfect pairs; the two wrong items of a list are tied
        0.4621
    """
    embeddings = Embeddings.of(image_features, text_features, logit_scale)
    return weighted_terms(embeddings, RankOptions(**options), torch.ones(3), in_modal=False)[1]


def in_modal(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0, **options: Any
) -> Tensor:
    """``½[C(I | X) + C(X | I)]``: the ranking of the images among themselves against that of their texts.

    Arguments, shapes and errors as in :class:`rankloss.RankConsistency`.

    Example:
        >>> v = torch.eye(3)
        >>> round(in_modal(v, v, 10.0).item(), 4)
        0.4621
    """
    embeddings = Embeddings.of(image_features, text_features, logit_scale)
    return weighted_terms(embeddings, RankOptions(**options), torch.ones(3), cross_modal=False)[2]
