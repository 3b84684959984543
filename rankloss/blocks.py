r"""Values and gradient of a block of lists: some rows of one similarity matrix.

A row of scores x = s·c with its pair's column k and a ranking of its items has up to two values,

    CE = log Σ_q e^{x_q} − x_k,   NLL = Σ_p μ_p·(log C_p − ℓ_p),

and with weights α and β their sum α·CE + β·NLL has the gradient (notation of :mod:`rankloss.ranked_sums`)

    ∂/∂ℓ_q = w_q·(α / Σw + β·U_q) − α·[q = k] − β·μ_q,

so the worths are made once for both, and the bracket is formed slot by slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.embeddings import scores_from
from rankloss.options import RankOptions
from rankloss.plackett_luce import log_worth_slope, nll_and_gradient
from rankloss.ranked_sums import Ranking, Slots, Worths, shifted_worths

__all__ = ["Block", "evaluate"]


class Block(NamedTuple):
    """Some rows of one matrix, ``[n, N]``.

    Attributes:
        cosines: the similarities c.
        own: ``[n]``, the column k of every row's own pair.
        alpha: weight of the cross-entropy, ``[]`` or ``[n, 1]``; None leaves it out.
        beta: weight of the ranking's NLL, likewise; None leaves it out.
        ranking: of the items by the reference; None without beta.
        gradient: filled with the gradient, by s·c under worth ``exp`` and by c under others; None computes
            values only.
    """

    cosines: Tensor
    own: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    ranking: Ranking | None
    gradient: Tensor | None

    def rows(self, rows: slice) -> Block:
        """Some of the rows; a gradient that is filled there is filled here."""

        def some(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.dim() == 0 else x[rows]

        return Block(
            self.cosines[rows],
            self.own[rows],
            some(self.alpha),
            some(self.beta),
            None if self.ranking is None else self.ranking.rows(rows),
            some(self.gradient),
        )


def evaluate(block: Block, scale: Tensor, options: RankOptions) -> tuple[Tensor | None, Tensor | None]:
    """CE and NLL of every row, ``[n]``, None where they have no weight."""
    worths = shifted_worths(block.cosines, scale, options.worth)
    if worths is None:
        return _evaluate_in_log_space(block, scale, options)
    total = slots = None
    if block.alpha is not None:
        total = worths.values.sum(-1, keepdim=True, dtype=torch.float64)
    if block.ranking is not None:
        slots = block.ranking.slots(worths.values)
    if block.gradient is not None:
        _fill_gradient(block, worths, total, slots, options)
    return (
        None if total is None else _cross_entropy(worths, total, block.own),
        None if slots is None else _nll(worths, slots),
    )


def _cross_entropy(worths: Worths, total: Tensor, own: Tensor) -> Tensor:
    return (total.log() + worths.shift - worths.log.gather(-1, own[:, None])).squeeze(-1)


def _nll(worths: Worths, slots: Slots) -> Tensor:
    """C is summed from shifted worths, so every −μ·ℓ becomes μ·(shift − ℓ)."""
    if slots.mu is not None:
        return slots.log_denominators + (slots.of_items(slots.mu) * (worths.shift - worths.log)).sum(-1)
    n = worths.log.shape[-1]
    lifted = worths.shift * n - worths.log.sum(-1, keepdim=True).double()
    return slots.log_denominators + lifted.squeeze(-1)


def _fill_gradient(
    block: Block, worths: Worths, total: Tensor | None, slots: Slots | None, options: RankOptions
) -> None:
    gradient, alpha, beta, w = block.gradient, block.alpha, block.beta, worths.values
    assert gradient is not None
    share: Tensor | None = None if total is None or alpha is None else alpha / total
    if slots is None or beta is None:
        bracket = share
    else:
        suffix = slots.suffix
        by_slot = suffix * beta if share is None else torch.addcmul(share, suffix, beta)
        bracket = slots.of_items(by_slot.to(w.dtype))
    assert bracket is not None
    if slots is None or beta is None:
        torch.mul(w, bracket, out=gradient)
    else:
        mu = beta if slots.mu is None else beta * slots.of_items(slots.mu)
        torch.addcmul(-mu, w, bracket, out=gradient)
    if alpha is not None:
        gradient.scatter_add_(-1, block.own[:, None], -alpha.to(gradient.dtype).expand(len(gradient), 1))
    slope = log_worth_slope(block.cosines, options.worth)
    if slope is not None:
        gradient *= slope


def _evaluate_in_log_space(
    block: Block, scale: Tensor, options: RankOptions
) -> tuple[Tensor | None, Tensor | None]:
    """For worths that float64 does not hold side by side."""
    scores = scores_from(block.cosines, scale, options)
    cross_entropy = nll = None
    if block.gradient is not None:
        block.gradient.zero_()
    if block.alpha is not None:
        log_share = scores.log_softmax(-1)
        cross_entropy = -log_share.gather(-1, block.own[:, None]).squeeze(-1)
        if block.gradient is not None:
            share = log_share.exp_().scatter_add_(-1, block.own[:, None], -torch.ones_like(scores[:, :1]))
            block.gradient.add_(share * block.alpha)
    if block.ranking is not None:
        nll, gradient = nll_and_gradient(scores, block.ranking.reference, options, block.ranking.shuffle)
        if block.gradient is not None and block.beta is not None:
            block.gradient.add_(gradient * block.beta)
    return cross_entropy, nll
