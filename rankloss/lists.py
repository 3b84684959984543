r"""The list engine: values and gradient of a block of lists, some rows of the similarity matrices.

A list of scores x = s·c, its own pair in column k and its items ranked by a reference y, has up to two
values,

    CE = log Σ_q e^{x_q} − x_k,   C(x | y) = (1/M) · Σ_p (log C_p − x_p),   C_p = Σ_{q : y_q ≤ y_p} e^{x_q},

p running over the items that count, M their number (1 with ``reduction="sum"``). The gradient of
α·CE + β·C(x | y) is

    ∂/∂x_q = e^{x_q}·(α / Σ e^x + (β/M)·U_q) − α·[q = k] − (β/M)·[q counts],

    U_q = Σ_{p : y_p ≥ y_q} 1 / C_p.

Under ``model="top_one"`` C(x | y) = Σ_q p_q·(log Σ e^x − x_q) with p = softmax(y), whose part of the gradient
is β·(e^{x_q} / Σ e^x − p_q). The sums are in float64, which holds them for scores of up to ±680 nats
(:data:`LARGEST_SCORE`); of unit-norm features none is beyond ±s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.batch import other_items
from rankloss.equal_rows import first_equal as first_equal
from rankloss.options import RankOptions
from rankloss.ranking import rank, slices

LARGEST_SCORE = 680.0  # summed over 10⁵ items and multiplied by as much again, e^±680 stays within float64


class Block(NamedTuple):
    """Some rows of several matrices, the same rows of each, and all that their values depend on.

    Attributes:
        cosines: c, ``[matrices, n, N]``.
        scale: s, ``[]``.
        alpha: weight of each matrix's cross-entropies, ``[matrices]``; None leaves them out.
        beta: weight of each matrix's C(x | y), likewise.
        reference: the cosines that the lists are ranked by, ``[matrices, n, N]``; None where the first matrix
            is ranked by the last of these, the second by the last but one, and so on.
        first_equal: for each matrix of the reference ``[N]``, the first item equal to item j, whose cosine
            counts, so that equal items are tied; None where no two items are equal.
        first_row: the column of the first row's own pair; the next row's is the next.
    """

    cosines: Tensor
    scale: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    reference: Tensor | None
    first_equal: tuple[Tensor | None, ...]
    first_row: int


class Evaluated(NamedTuple):
    """What a block's lists come to.

    Attributes:
        cross_entropy: CE, ``[matrices, n]``; None without alpha.
        nll: C(x | y), ``[matrices, n]``; None without beta.
        gradient: of Σ α·CE + β·C by s·c, ``[matrices, n, N]``, maybe in the memory of the block's cosines;
            None where none is wanted.
    """

    cross_entropy: Tensor | None
    nll: Tensor | None
    gradient: Tensor | None


def evaluate(block: Block, options: RankOptions, lists_at_once: int, *, with_gradient: bool) -> Evaluated:
    """Values of a block of lists, so many of them at a time, and the gradient where it is wanted.

    It is written over the cosines: nothing in memory is larger than they are.
    """
    if block.beta is not None and not options.diagonal:
        return _without_own(block, options, lists_at_once, with_gradient)
    cosines = block.cosines
    own = cosines.diagonal(block.first_row, 1, 2).clone()  # before the gradient is written there
    alpha, beta = (None if w is None else w.view(-1, 1, 1) for w in (block.alpha, block.beta))
    scale = block.scale.double().view(1)  # of one dimension, so that what it multiplies becomes float64
    found = []
    for rows in slices(cosines.shape[1], max(1, lists_at_once // len(cosines))):
        y = None if beta is None else _exact_reference(block, rows)
        c = cosines[:, rows]
        found.append(_evaluate_lists(c, y, scale, alpha, beta, options, with_gradient=with_gradient))
    nll = None if beta is None else together([x for _, x in found if x is not None])
    gradient = cosines if with_gradient else None
    if block.alpha is None:
        return Evaluated(None, nll, gradient)
    if gradient is not None:
        gradient.diagonal(block.first_row, 1, 2).sub_(block.alpha.unsqueeze(-1))
    log_sums = together([x for x, _ in found])
    return Evaluated(torch.addcmul(log_sums, own, scale, value=-1), nll, gradient)


def together(of_slices: list[Tensor]) -> Tensor:
    """What slices of the rows were found to have, ``[matrices, n]`` each, as one tensor."""
    return of_slices[0] if len(of_slices) == 1 else torch.cat(of_slices, 1)


def _exact_reference(block: Block, rows: slice) -> Tensor:
    """``[matrices, n, N]`` of some rows, equal items tied exactly, whatever the rounding of their cosines."""
    reference = (block.cosines if block.reference is None else block.reference)[:, rows]
    if all(equal is None for equal in block.first_equal):
        return reference.flip(0) if block.reference is None else reference
    matrices = reference.unbind()[:: -1 if block.reference is None else 1]
    pairs = zip(matrices, block.first_equal, strict=True)
    return torch.stack([y if equal is None else y.index_select(-1, equal) for y, equal in pairs])


def _without_own(block: Block, options: RankOptions, lists_at_once: int, with_gradient: bool) -> Evaluated:
    """With ``diagonal=False``: the cross-entropy is of all items, the lists are of all but the own pair."""
    _, n, n_items = block.cosines.shape
    reference = _exact_reference(block, slice(None))
    own = torch.arange(block.first_row, block.first_row + n, device=reference.device)
    others = other_items(own, n_items).expand(len(reference), -1, -1)
    of_others = block._replace(
        cosines=block.cosines.gather(-1, others),
        reference=reference.gather(-1, others),
        first_equal=(None,) * len(reference),
        alpha=None,
    )
    options_of_others = options.replaced(diagonal=True)
    _, nll, by_others = evaluate(of_others, options_of_others, lists_at_once, with_gradient=with_gradient)
    cross_entropy = gradient = None
    if block.alpha is not None:
        of_all = block._replace(beta=None)
        cross_entropy, _, gradient = evaluate(of_all, options, lists_at_once, with_gradient=with_gradient)
    if by_others is not None:
        gradient = block.cosines.zero_() if gradient is None else gradient
        gradient.scatter_add_(-1, others, by_others)
    return Evaluated(cross_entropy, nll, gradient)


def _evaluate_lists(
    cosines: Tensor,
    reference: Tensor | None,
    scale: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    options: RankOptions,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log Σ e^x and C(x | y) of lists ``[matrices, n, N]``.

    The gradient by x, without its part −α·[q = k], is written over the cosines.
    """
    ranking = None if reference is None or options.model == "top_one" else rank(reference, options)
    order = None if ranking is None else ranking.order
    c = cosines if order is None else cosines.gather(-1, order)
    x = c * scale
    counted, items = (None, c.shape[-1]) if ranking is None else (ranking.counted, ranking.items)
    scores = (x if counted is None else x * counted).sum(-1, keepdim=True)
    w = x.exp_()
    C = w.sum(-1, keepdim=True) if ranking is None else ranking.denominators(w)
    total = C[..., -1:]
    log_sums = total.log()
    bracket = None if alpha is None else alpha / total
    nll = share = None
    if ranking is not None:
        assert beta is not None
        divisor = items if options.reduction == "mean" else 1
        nll = ranking.weigh(C.log()).sum(-1, keepdim=True).sub_(scores).div_(divisor).squeeze(-1)
        if with_gradient:
            share = beta / divisor
            by_slot = ranking.weigh(torch.div(share, C, out=C))
            if bracket is not None:
                by_slot[..., -1:].add_(bracket)  # every item's sum runs over the last slot
            bracket = ranking.of_items(by_slot.flip(-1).cumsum_(-1).flip(-1))
            share = share if counted is None else share * counted
    elif beta is not None:
        assert reference is not None
        p = top_one_probabilities(reference, scale, options)
        nll = (p * torch.addcmul(log_sums, c, scale, value=-1)).sum(-1)
        bracket = beta / total if bracket is None else bracket + beta / total
        share = beta * p
    if with_gradient:
        assert bracket is not None
        share = total.new_zeros(()) if share is None else share
        torch.addcmul(-share, w, bracket, out=c)
        if order is not None:
            cosines.scatter_(-1, order, c)
    return log_sums.squeeze(-1), nll


def top_one_probabilities(reference: Tensor, scale: Tensor, options: RankOptions) -> Tensor:
    """The p = softmax(y) of lists of cosines, without gradient; y is on the given scale or its own."""
    reference = reference.detach()
    factor = scale.detach() if options.reference_scale is None else options.reference_scale
    # The difference first: it is exact near the largest, where a product's rounding would count.
    return (factor * (reference - reference.amax(-1, keepdim=True))).softmax(-1)
