"""The losses that are compared. Each is called as :class:`rankloss.RankedLists` is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import RankedLists

LAMBDARANK, NDCG_LOSS_2PP = "LambdaRank", "NDCG-Loss2++"
MU = 10.0  # of NDCG-Loss2++, as in the paper

# The losses' own options, two of each; grades are from 0 to 1.
OPTIONS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "plackett_luce": {
        "zeros tied": RankedLists,
        "zeros unranked": lambda: ChangedGrades(RankedLists(), lambda g: g.masked_fill(g == 0, -math.inf)),
    },
    "top_one": {
        "grades × 8": lambda: ChangedGrades(RankedLists(model="top_one"), lambda g: 8 * g),
        "grades × 16": lambda: ChangedGrades(RankedLists(model="top_one"), lambda g: 16 * g),
    },
    "pairwise": {
        "pairs alike": lambda: RankedLists(model="pairwise"),
        "pairs by difference": lambda: RankedLists(model="pairwise", pair_weight="difference"),
    },
    "squared_error": {"cosine": lambda: SquaredError(), "affine": lambda: SquaredError(affine=True)},
    "lambda": {
        LAMBDARANK: lambda: LambdaLoss(LAMBDARANK),
        NDCG_LOSS_2PP: lambda: LambdaLoss(NDCG_LOSS_2PP),
    },
}


class ChangedGrades(nn.Module):
    """A loss of lists whose grades are changed first."""

    def __init__(self, loss: RankedLists, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.loss, self.change = loss, change

    def forward(
        self, queries: Tensor, candidates: Tensor, grades: Tensor, logit_scale: Tensor, **places: Tensor
    ) -> Tensor:
        """Return the loss."""
        value: Tensor = self.loss(queries, candidates, self.change(grades), logit_scale, **places)
        return value


class SquaredError(nn.Module):
    """Mean over candidates of (a·cos + b − grade)², with a = 1 and b = 0, or both learned from there."""

    def __init__(self, *, affine: bool = False) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.tensor(x), requires_grad=affine) for x in (1.0, 0.0))

    def forward(
        self,
        queries: Tensor,
        candidates: Tensor,
        grades: Tensor,
        logit_scale: Tensor,  # noqa: ARG002 - makes no difference here
        *,
        candidate_index: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the loss of unit-norm features."""
        cosines = (queries @ candidates.T).gather(1, candidate_index)
        return (self.slope * cosines + self.offset - grades)[mask].square().mean()


class LambdaLoss(nn.Module):
    r"""LambdaLoss: Σ_{p, q : g_p > g_q} w_pq·log₂(1 + e^{x_q − x_p}), averaged over the lists.

    With G the grades over the list's ideal DCG, r the ranks by score and D(r) = log₂(1 + r):

        LambdaRank     w_pq = |G_p − G_q|·|1/D(r_p) − 1/D(r_q)|, the change of nDCG if p and q swap places
        NDCG-Loss2++   w_pq = |G_p − G_q|·(|1/D(r_p) − 1/D(r_q)| + μ·|1/D(d) − 1/D(d + 1)|), d = |r_p − r_q|

    Gains are linear, as those of the nDCG that is measured. Weights carry no gradient.

    References:
        "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.mu = {LAMBDARANK: 0.0, NDCG_LOSS_2PP: MU}[weights]

    def forward(
        self,
        queries: Tensor,
        candidates: Tensor,
        grades: Tensor,
        logit_scale: Tensor,
        *,
        candidate_index: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the loss of unit-norm features."""
        x = (logit_scale * queries @ candidates.T).gather(1, candidate_index)
        weights = lambda_weights(x.detach(), grades, mask, mu=self.mu)
        terms = F.softplus(x[:, None, :] - x[:, :, None]) / math.log(2)
        return (weights * terms).sum((1, 2)).mean()


def lambda_weights(x: Tensor, grades: Tensor, mask: Tensor, *, mu: float) -> Tensor:
    """Return the weights of the pairs p, q with g_p > g_q, 0 elsewhere: ``[N, K, K]``.

    Items of equal scores stand in the order of their places.
    """
    x, grades = x.masked_fill(~mask, -math.inf), grades.masked_fill(~mask, 0.0)
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    discounts = 1 / (1.0 + places).log2()
    order = x.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    ideal = (grades.sort(dim=1, descending=True).values * discounts).sum(1).clamp_min(1e-9)
    gains = grades / ideal[:, None]
    discount = discounts[ranks - 1]
    change = (discount[:, :, None] - discount[:, None, :]).abs()
    if mu:
        steps = F.pad(discounts[:-1] - discounts[1:], (1, 0))  # by the distance; 0 for an item and itself
        change = change + mu * steps[(ranks[:, :, None] - ranks[:, None, :]).abs()]
    weights = (gains[:, :, None] - gains[:, None, :]).clamp_min(0.0) * change
    return weights.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)


def build(model: str, option: str) -> nn.Module:
    """Return the loss of a model with one of its own options.

    Raises:
        ValueError: For another name.
    """
    if option not in OPTIONS.get(model, {}):
        raise ValueError(
            f"model, option: must be among {OPTIONS.keys()} and theirs, got {model!r}, {option!r}"
        )
    return OPTIONS[model][option]()
