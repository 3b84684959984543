r"""The public functions: Plackett–Luce of one list, and the two rank terms of a batch.

With S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ, and C the NLL of a matrix's lists (see
:func:`plackett_luce_nll`),

    cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)],

or one direction of each if the other modality's rankings are a fixed reference. With a teacher's features V',
T' each matrix is ranked by the teacher's matrix, S' = V'·T'ᵀ and so on,

    cross = ½[C(S | S') + C(R | R')],   in = ½[C(I | I') + C(X | X')].

Similarities, order and sums are computed in float32 at least, for any dtype of the features and in any
autocast region: half-precision similarities would tie neighbours. The exception is a GPU where torch allows
TF32 products, as open_clip's trainer does: the features are float32, their products have TF32's precision.
The gradient is that of the products' order. If reference items are closer than a rounding error, or the
products are TF32's, it differs from float64's by up to some 1e-3.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rankloss import dense
from rankloss import reference as literal
from rankloss.checks import check_device, check_is_tensor
from rankloss.losses import TEACHER, RankConsistency
from rankloss.options import RankOptions
from rankloss.precision import outside_graphs
from rankloss.reference import Discount, Ties, Worth

__all__ = ["cross_modal", "in_modal", "plackett_luce_nll"]


@outside_graphs
def plackett_luce_nll(
    scores: Tensor,
    reference: Tensor,
    *,
    worth: Worth = "exp",
    ties: Ties = "shared",
    discount: Discount | None = None,
    top_k: int | None = None,
) -> Tensor:
    r"""Negative log-likelihood of the reference's ranking under a Plackett–Luce model of the scores.

        NLL(x | y) = Σ_p μ_p · [ log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p) ]

    Items tied in the reference share one denominator (Breslow's rule), so the value does not depend on the
    order of the items. The reference only gives the order and never receives a gradient. The NLL is computed
    in float32 at least, for any dtype of the scores, and differentiable any number of times in reverse mode.

    Other options than ``top_k`` are computed by :func:`rankloss.reference.plackett_luce`, in O(N²) memory.

    Args:
        scores: ``[..., N]``, floating point, the x of the formula.
        reference: ``[..., N]``, the y of the formula: any real dtype, larger is better.
        worth: w(x): ``"exp"`` for eˣ; for cosines also ``"shifted"`` for (1 + x)/2 and ``"identity"`` for x
            itself.
        ties: ``"shared"`` as in the formula, or ``"random"``: tied items are shuffled, with one shuffle for
            all lists of the call, from torch's default generator of the scores' device.
        discount: None for μ = 1; ``"log"`` for μ_p = 1 / log(1 + rank of p), where the best rank is 1 and
            tied items share their best rank.
        top_k: keep only the terms of ranks ≤ k; their denominators still run over the whole tail.

    Returns:
        ``[...]``: one value per list, in nats, not normalised by N. NaN in a list gives NaN.

    Raises:
        ValueError: for shapes that differ or have no items, tensors on different devices, integer scores, an
            unknown option, ``top_k`` < 1, a complex reference, or a score whose worth is not positive (the
            message shows the smallest score; on an accelerator and in a compiled graph the value is NaN
            instead, since reading scores would wait or break the graph).
        TypeError: for scores or a reference that is not a tensor.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025; "The Analysis of Permutations",
        1975 (the model); "Covariance Analysis of Censored Survival Data", 1974 (ties).

    Example:
        With equal scores every ranking of N items is equally likely, so the value is log N!:

        >>> nll = plackett_luce_nll(torch.zeros(4), torch.tensor([0.3, 0.1, 0.2, 0.4]))
        >>> round(nll.exp().item())
        24
    """
    options = RankOptions(top_k=top_k, reduction="sum")
    check_is_tensor("scores", scores)
    check_is_tensor("reference", reference)
    if scores.shape != reference.shape or scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(
            "scores and reference must have one shape [..., N] with N >= 1; "
            f"got scores {tuple(scores.shape)} and reference {tuple(reference.shape)}"
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point; got {scores.dtype}")
    if reference.is_complex():
        raise ValueError(f"reference must be real numbers, which have an order; got {reference.dtype}")
    check_device("reference", reference, scores, "scores")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if (worth, ties, discount) == ("exp", "shared", None):
        return dense.nll_terms(scores, reference.detach(), options).sum(-1)
    nll: Tensor = literal.plackett_luce(
        scores, reference, worth=worth, ties=ties, discount=discount, top_k=options.top_k
    )
    return nll


def cross_modal(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0, **named: Any
) -> Tensor:
    """``½[C(S | R) + C(R | S)]``: the image's ranking of the texts against the text's ranking of the images.

    With a teacher's features of both modalities, ``reference_image_features=`` and
    ``reference_text_features=``, it is ``½[C(S | S') + C(R | R')]``. The function is
    :class:`rankloss.RankConsistency` with one term, for this process's pairs, with the class's shapes and
    errors, and the options of :class:`rankloss.RankOptions`.

    Example:
        >>> v = torch.eye(3)
        >>> round(cross_modal(v, v, 10.0).item(), 4)  # perfect pairs; the two wrong items of a list are tied
        0.4621
    """
    weights = {"cross_modal": 1.0, "in_modal": 0.0}
    return _one_term(weights, image_features, text_features, logit_scale, **named)


def in_modal(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0, **named: Any
) -> Tensor:
    """``½[C(I | X) + C(X | I)]``: the images' ranking among themselves against their texts'.

    With a teacher's features of both modalities it is ``½[C(I | I') + C(X | X')]``; with one modality, whose
    matrix is Y', ``½[C(I | Y') + C(X | Y')]``. Arguments as for :func:`cross_modal`.

    Example:
        >>> v = torch.eye(3)
        >>> round(in_modal(v, v, 10.0).item(), 4)
        0.4621
    """
    weights = {"cross_modal": 0.0, "in_modal": 1.0}
    return _one_term(weights, image_features, text_features, logit_scale, **named)


def _one_term(weights: dict[str, float], *inputs: Any, **named: Any) -> Tensor:
    """The loss with one term only, of a batch.

    Args:
        weights: of both terms, 0 for the other one.
        *inputs: images, texts and the scale.
        **named: a teacher's features and the options, by their names.
    """
    teacher = {name: named.pop(name) for name in TEACHER if name in named}
    options = RankOptions(**named)  # checked, and hashable
    loss = _loss_of_this_process(options, **weights)
    return loss(*inputs, **teacher)  # type: ignore[no-any-return]


@functools.lru_cache  # a loss reads the values of its inputs, and warns, at its first call alone
def _loss_of_this_process(options: RankOptions, **weights: float) -> RankConsistency:
    return RankConsistency(gather=False, **weights, **options.changed)
