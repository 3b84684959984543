r"""The public functions: Plackett–Luce of one list, and the two rank terms of a batch.

With S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ, and C the NLL of a matrix's lists (see
:func:`plackett_luce_nll`),

    cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)],

or one direction of each where the other modality's rankings are a fixed reference. With a teacher's features
V', T' each matrix is ranked by the teacher's own, S' = V'·T'ᵀ and so on,

    cross = ½[C(S | S') + C(R | R')],   in = ½[C(I | I') + C(X | X')].

Similarities, order and sums are computed in float32 at least, whatever the features' dtype or an enclosing
autocast region asks for: half-precision similarities would make ties of neighbours. In float32 the gradient
is that of the order which the float32 products give: where items of a reference are closer than a rounding,
and where TF32 products are allowed, it differs from float64's by up to some 1e-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloss import dense
from rankloss.batch import RANK_TERMS, Batch, Term
from rankloss.checks import (
    WITHOUT_CROSS_MODAL,
    check_device,
    check_features,
    check_is_tensor,
    check_one_space,
    check_scale,
    check_teacher,
)
from rankloss.engine import weighted_terms
from rankloss.options import Discount, RankOptions, Ties, Worth
from rankloss.precision import outside_graphs

_TERMS = ("contrastive", *RANK_TERMS)

__all__ = ["check_references", "cross_modal", "in_modal", "plackett_luce_nll"]


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

    Items that are tied in the reference share one denominator (Breslow's rule), so the value does not depend
    on the order of the items. The reference gives the order only and never receives a gradient. Computed in
    float32 at least, whatever the dtype of the scores; differentiable any number of times, in reverse mode.

    Args:
        scores: ``[..., N]``, floating point, the x of the formula.
        reference: ``[..., N]``, the y of the formula: any real dtype, larger is better.
        worth: w(x): ``"exp"`` for eˣ; ``"shifted"`` for (1 + x)/2 and ``"identity"`` for x itself, where x is
            a cosine.
        ties: ``"shared"`` as in the formula, or ``"random"``: tied items are put in a random order, one
            shuffle for all lists of the call, drawn from torch's default generator of the scores' device.
        discount: None for μ = 1; ``"log"`` for μ_p = 1 / log(1 + rank of p), where the best rank is 1 and
            tied items share their best rank.
        top_k: keep the terms of the positions of rank ≤ k only; their denominators still run over the whole
            tail.

    Returns:
        ``[...]``: one value per list, in nats, not normalised by N. NaN in a list gives NaN.

    Raises:
        ValueError: for shapes that differ or hold no item, tensors on different devices, integer scores, an
            unknown option, ``top_k`` < 1, or a score whose worth is not positive (the message holds the
            smallest score; on an accelerator and in a compiled graph, where a look at the scores would cost a
            wait or a break, the value is NaN instead).
        TypeError: for scores or a reference that is no tensor.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025; "The Analysis of Permutations",
        1975 (the model); "Covariance Analysis of Censored Survival Data", 1974 (ties).

    Example:
        With equal scores every ranking of N items is equally likely, so the value is log N!:

        >>> nll = plackett_luce_nll(torch.zeros(4), torch.tensor([0.3, 0.1, 0.2, 0.4]))
        >>> round(nll.exp().item())
        24
    """
    options = RankOptions(worth=worth, ties=ties, discount=discount, top_k=top_k, reduction="sum")
    check_is_tensor("scores", scores)
    check_is_tensor("reference", reference)
    if scores.shape != reference.shape or scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(
            "scores and reference must have one shape [..., N] with N >= 1; "
            f"got scores {tuple(scores.shape)} and reference {tuple(reference.shape)}"
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point; got {scores.dtype}")
    check_device("reference", reference, scores, "scores")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return dense.nll_terms(scores, reference.detach(), options).sum(-1)


def check_references(
    options: RankOptions,
    *,
    cross_modal: bool,
    reference_image_features: Tensor | None,
    reference_text_features: Tensor | None,
) -> None:
    """Raise a ValueError unless a teacher's features fit the options and the terms that are wanted."""
    image, text = reference_image_features, reference_text_features
    if image is None and text is None:
        if options.reference_scale is not None:
            raise ValueError(
                f"reference_scale={options.reference_scale!r} multiplies a teacher's similarities; it needs "
                "reference_image_features or reference_text_features"
            )
        return
    given = "reference_text_features" if image is None else "reference_image_features"
    if options.fixed_reference is not None:
        raise ValueError(
            f"fixed_reference={options.fixed_reference!r} fixes one of the batch's own rankings; it does not "
            f"apply beside {given}"
        )
    if not cross_modal:
        return
    if image is None or text is None:
        raise ValueError(
            "the cross-modal term needs reference_image_features and reference_text_features; got "
            f"{given} alone, which ranks the in-modal term: {WITHOUT_CROSS_MODAL}"
        )
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            "reference_image_features and reference_text_features must have one dimension in the "
            f"cross-modal term; got {tuple(image.shape)} and {tuple(text.shape)}. Of encoders that share no "
            f"space {WITHOUT_CROSS_MODAL}"
        )


def cross_modal(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0, **options: Any
) -> Tensor:
    """``½[C(S | R) + C(R | S)]``: the image's ranking of the texts against the text's ranking of the images.

    With a teacher's features of both modalities, ``reference_image_features=`` and
    ``reference_text_features=``, it is ``½[C(S | S') + C(R | R')]``. Arguments, shapes and errors as in
    :class:`rankloss.RankConsistency`.

    Example:
        >>> v = torch.eye(3)
        >>> round(cross_modal(v, v, 10.0).item(), 4)  # perfect pairs; the two wrong items of a list are tied
        0.4621
    """
    return _term("cross_modal", (image_features, text_features, logit_scale), **options)


def in_modal(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0, **options: Any
) -> Tensor:
    """``½[C(I | X) + C(X | I)]``: the ranking of the images among themselves against that of their texts.

    With a teacher's features of both modalities it is ``½[C(I | I') + C(X | X')]``, and with those of one,
    whose matrix is Y', ``½[C(I | Y') + C(X | Y')]``. Arguments as of :func:`cross_modal`.

    Example:
        >>> v = torch.eye(3)
        >>> round(in_modal(v, v, 10.0).item(), 4)
        0.4621
    """
    return _term("in_modal", (image_features, text_features, logit_scale), **options)


@outside_graphs
def _term(
    term: Term,
    inputs: tuple[Tensor, Tensor, Tensor | float],
    *,
    reference_image_features: Tensor | None = None,
    reference_text_features: Tensor | None = None,
    **options: Any,
) -> Tensor:
    checked = RankOptions(**options)
    image_features, text_features, logit_scale = inputs
    teacher = {
        "reference_image_features": reference_image_features,
        "reference_text_features": reference_text_features,
    }
    check_features(image_features, text_features)
    if term == "cross_modal":
        check_one_space(image_features, text_features)
    check_scale(logit_scale, image_features)
    for name, x in teacher.items():
        if x is not None:
            check_teacher(name, x, image_features, first_look=False)
    check_references(checked, cross_modal=term == "cross_modal", **teacher)
    batch = Batch.of(
        *inputs, reference_image=reference_image_features, reference_text=reference_text_features
    )
    weights = torch.ones(3, dtype=torch.float64, device="cpu")
    wanted = [name == term for name in _TERMS]
    return weighted_terms(batch, checked, weights, wanted)[_TERMS.index(term)]
