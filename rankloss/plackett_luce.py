r"""The Plackett–Luce model of one list: its negative log-likelihood and that value's gradient.

For scores x, a reference y that gives the order, and a positive worth w(x),

    NLL(x | y) = Σ_p μ_p · [ log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p) ].

:func:`plackett_luce_nll` is this formula in plain differentiable operations. :func:`nll_and_gradient` is its
closed form, value and ∂NLL/∂x from one sort, for callers that manage their own backward pass. Both work on
ℓ = log w(x) in log space throughout, so that no sum underflows however far apart the scores are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.options import Discount, RankOptions, Ties, Worth
from rankloss.ties import group_bounds

__all__ = [
    "log_worth",
    "log_worth_slope",
    "nll_and_gradient",
    "nll_terms",
    "plackett_luce_nll",
    "random_shuffle",
    "shuffled_order",
    "weights_of_ranks",
]


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
    float32 at least, whatever the dtype of the scores; differentiable any number of times.

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
        ``[...]``: one value a list, in nats, not normalised by N. NaN in a list gives NaN.

    Raises:
        ValueError: for shapes that differ or hold no item, integer scores, an unknown option, ``top_k`` < 1,
            or a score whose worth is not positive (the message holds the smallest score).

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025; "The Analysis of Permutations",
        1975 (the model); "Covariance Analysis of Censored Survival Data", 1974 (ties).

    Example:
        With equal scores every ranking of N items is equally likely, so the value is log N!:

        >>> nll = plackett_luce_nll(torch.zeros(4), torch.tensor([0.3, 0.1, 0.2, 0.4]))
        >>> round(nll.exp().item())
        24
    """
    options = RankOptions(worth=worth, ties=ties, discount=discount, top_k=top_k)
    if scores.shape != reference.shape or scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(
            "scores and reference must have one shape [..., N] with N >= 1; "
            f"got scores {tuple(scores.shape)} and reference {tuple(reference.shape)}"
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point; got {scores.dtype}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    shuffle = random_shuffle(scores.shape[-1], scores.device, options)
    return nll_terms(scores, reference.detach(), options, shuffle).sum(-1)


class _Ranking(NamedTuple):
    """A reference put in order, worst item first, so that {q : y_q ≤ y_p} is a prefix."""

    order: Tensor
    first: Tensor | None  # bounds of every position's tie group; None where no two items count as tied
    last: Tensor | None

    @property
    def best_rank(self) -> Tensor:
        """The rank of every position, 1 for the best; tied items share their best rank."""
        n = self.order.shape[-1]
        return torch.arange(n, 0, -1, device=self.order.device) if self.last is None else n - self.last

    def at_first(self, x: Tensor) -> Tensor:
        return x if self.first is None else x.gather(-1, self.first)

    def at_last(self, x: Tensor) -> Tensor:
        return x if self.last is None else x.gather(-1, self.last)


def random_shuffle(n: int, device: torch.device, options: RankOptions) -> Tensor | None:
    """The shuffle that ``ties="random"`` puts before the sort; None for shared ties."""
    return torch.randperm(n, device=device) if options.ties == "random" else None


def shuffled_order(reference: Tensor, shuffle: Tensor) -> Tensor:
    """The ascending order of every list, tied items in the order of the shuffle."""
    return shuffle[reference[..., shuffle].argsort(dim=-1, stable=True)]


def _rank(reference: Tensor, shuffle: Tensor | None) -> _Ranking:
    if shuffle is not None:
        return _Ranking(shuffled_order(reference, shuffle), None, None)
    ordered, order = reference.sort(dim=-1)
    return _Ranking(order, *group_bounds(ordered))


def weights_of_ranks(rank: Tensor, options: RankOptions) -> Tensor | None:
    """The μ of items of these ranks, float64, the best rank being 1; None where all are 1."""
    if not options.weighs_ranks:
        return None
    rank = rank.double()
    mu = torch.ones_like(rank) if options.discount is None else rank.log1p().reciprocal()
    return mu if options.top_k is None else torch.where(rank <= options.top_k, mu, 0)


def log_worth(scores: Tensor, worth: Worth) -> Tensor:
    """The log w(x), or a ValueError that shows the smallest score where the logarithm does not exist."""
    if worth == "exp":
        return scores
    floor = -1.0 if worth == "shifted" else 0.0
    smallest = scores.detach().amin()  # NaN is not below the floor: it passes, and makes the value NaN
    if bool(smallest <= floor):
        raise ValueError(
            f"worth={worth!r} needs scores above {floor:g}, where their logarithm exists; "
            f"the smallest is {smallest.item():g}"
        )
    return scores.log1p() - math.log(2) if worth == "shifted" else scores.log()


def log_worth_slope(scores: Tensor, worth: Worth) -> Tensor | None:
    """The derivative of log w(x), or None where it is 1."""
    if worth == "exp":
        return None
    return (1 + scores if worth == "shifted" else scores).reciprocal()


def _nan_where_unordered(reference: Tensor) -> Tensor | None:
    """A factor a list: 1, or NaN where the reference holds a NaN and so has no order."""
    if not reference.is_floating_point():
        return None
    return torch.where(reference.isnan().any(-1, keepdim=True), math.nan, 1.0)


class _RankedTerms(NamedTuple):
    """A list's summands and what they are made of, all in the order of the ranking."""

    ranking: _Ranking
    log_worth: Tensor
    log_denominator: Tensor
    mu: Tensor | None
    terms: Tensor


def _ranked_terms(
    scores: Tensor, reference: Tensor, options: RankOptions, shuffle: Tensor | None
) -> _RankedTerms:
    ranking = _rank(reference, shuffle)
    ranked = log_worth(scores, options.worth).gather(-1, ranking.order)
    log_denominator = ranking.at_last(torch.logcumsumexp(ranked, -1))
    terms = log_denominator - ranked
    mu = weights_of_ranks(ranking.best_rank, options)
    if mu is not None:
        mu = mu.to(scores.dtype)
        # Selected, not multiplied by 0: the second derivative of logcumsumexp is NaN where its upstream is 0.
        terms = torch.where(mu > 0, terms * mu, 0)
    return _RankedTerms(ranking, ranked, log_denominator, mu, terms)


def nll_terms(scores: Tensor, reference: Tensor, options: RankOptions, shuffle: Tensor | None) -> Tensor:
    """The summands of the NLL, item by item, in the items' own order: ``[..., N]``, differentiable."""
    ranked = _ranked_terms(scores, reference, options, shuffle)
    terms = torch.empty_like(ranked.terms).scatter(-1, ranked.ranking.order, ranked.terms)
    factor = _nan_where_unordered(reference)
    return terms if factor is None else terms * factor.to(terms.dtype)


def nll_and_gradient(
    scores: Tensor, reference: Tensor, options: RankOptions, shuffle: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""NLL of every list and its gradient by the scores, in closed form and without autograd.

    With ℓ = log w(x) and C_p the denominator of position p,

        ∂NLL/∂ℓ_q = −μ_q + e^{ℓ_q} · Σ_{p : y_p ≥ y_q} μ_p / C_p,

    where the sum is the reverse running sum of μ / C, taken at the start of q's tie group.

    Args:
        scores: ``[..., N]``, float32 or float64.
        reference: ``[..., N]``.
        options: of the list.
        shuffle: what :func:`random_shuffle` gave for them.

    Returns:
        The NLL, ``[...]``, and the gradient, ``[..., N]``.
    """
    ranking, ranked, log_denominator, mu, terms = _ranked_terms(scores, reference, options, shuffle)
    log_share = -log_denominator if mu is None else mu.log() - log_denominator
    log_sum = torch.logcumsumexp(log_share.flip(-1), -1).flip(-1)
    gradient = (ranked + ranking.at_first(log_sum)).exp_() - (1.0 if mu is None else mu)
    gradient = torch.empty_like(gradient).scatter_(-1, ranking.order, gradient)
    slope = log_worth_slope(scores, options.worth)
    if slope is not None:
        gradient *= slope
    nll = terms.sum(-1)
    factor = _nan_where_unordered(reference)
    if factor is not None:
        nll, gradient = nll * factor.squeeze(-1).to(nll.dtype), gradient * factor.to(nll.dtype)
    return nll, gradient
