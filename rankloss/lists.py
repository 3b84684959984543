r"""Value and gradient of a block of lists: some rows of one similarity matrix.

A row of scores x = s·c with its pair's column k and a ranking of its items has up to two values,

    CE = log Σ_q e^{x_q} − x_k,   NLL = Σ_p μ_p·(log C_p − ℓ_p),   ℓ = log w,

C and U being the running sums of :mod:`rankloss.ranking`. With weights α and β their sum α·CE + β·NLL has the
gradient

    ∂/∂ℓ_q = w_q·(α / Σw + β·U_q) − α·[q = k] − β·μ_q,

so the worths are made once for both, and the bracket is formed slot by slot. Under ``model="top_one"`` the
ranking's NLL is the cross-entropy from p = softmax(y) to softmax(x), and its gradient w_q·β / Σw − β·p_q.

The sums are plain ones, in float64, of worths that are shifted into its range. This is several times faster
than sums in log space, and as exact, as long as the worths of one list do not span more than float64 holds;
where they do, the definition (:mod:`rankloss.likelihood`) and autograd take over. Where the plan's kernel is
``"triton"``, ranked lists are evaluated by :mod:`rankloss.kernels` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import kernels
from rankloss.batch import may_look_at, other_items
from rankloss.likelihood import (
    list_terms,
    log_worth,
    log_worth_slope,
    scores_from,
    top_one_probabilities,
)
from rankloss.options import Plan, RankOptions
from rankloss.ranking import Ranking, extremes, rankings, slices

__all__ = ["Block", "Evaluated", "evaluate"]

# How far log worths may reach from the middle of their range, in nats: summed over 10⁵ items and multiplied
# by as much again, e^±70 in float32 and e^±680 in float64 neither overflow nor lose bits.
_REACH = {torch.float32: 70.0, torch.float64: 680.0}


class Block(NamedTuple):
    """Some rows of one matrix, and all that their values and gradient depend on.

    Attributes:
        cosines: the similarities c, ``[n, N]``.
        own: ``[n]``, the column k of every row's own pair; None where it counts for nothing.
        scale: s, ``[]``.
        alpha: weight of the cross-entropy, ``[]`` or ``[n, 1]``; None leaves it out.
        beta: weight of the ranking's NLL, likewise; None leaves it out.
        reference: the cosines that the lists are ranked by, ``[n, N]``; None without beta.
        first_equal: ``[N]``, the first item equal to item j, whose reference counts; None where no two are.
        first_row: the first row's k; the next row's is the next.
        shuffle: ``[N]`` under ``ties="random"``; else None.
        owns_reference: whether nobody else reads the reference, so that the gradient may take its place.
    """

    cosines: Tensor
    own: Tensor | None
    scale: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    reference: Tensor | None = None
    first_equal: Tensor | None = None
    first_row: int = 0
    shuffle: Tensor | None = None
    owns_reference: bool = False

    def rows(self, rows: slice) -> Block:
        """The same for some of the rows."""
        return self._replace(
            cosines=self.cosines[rows],
            own=None if self.own is None else self.own[rows],
            alpha=self.alpha if self.alpha is None or self.alpha.dim() == 0 else self.alpha[rows],
            beta=self.beta if self.beta is None or self.beta.dim() == 0 else self.beta[rows],
            reference=None if self.reference is None else self.reference[rows],
            first_row=self.first_row + rows.start,
        )

    def exact_reference(self, out: Tensor | None = None) -> Tensor:
        """The reference, in which equal items are tied exactly; in ``out``, where that is given."""
        assert self.reference is not None
        if self.first_equal is not None:
            return torch.index_select(self.reference, -1, self.first_equal, out=out)
        return self.reference if out is None else out.copy_(self.reference)

    def above(self, other: Block, cosines: Tensor) -> Block:
        """Both blocks one above the other; ``cosines``, ``[2·n, N]``, are those of both."""
        reference = None
        if self.reference is not None:
            reference = torch.empty_like(cosines)
            for block, out in zip((self, other), reference.view(2, *self.cosines.shape), strict=True):
                block.exact_reference(out)
        alpha, beta = (x if x is None or x.dim() == 0 else torch.cat([x, x]) for x in (self.alpha, self.beta))
        return Block(
            cosines, None if self.own is None else self.own.repeat(2), self.scale, alpha, beta, reference,
            owns_reference=reference is not None,
        )  # fmt: skip


class Evaluated(NamedTuple):
    """What a block's lists come to.

    Attributes:
        cross_entropy: CE of every row, ``[n]``; None without alpha.
        nll: NLL of every row, ``[n]``, divided by its Σ_p μ_p with ``reduction="mean"``; None without beta.
        gradient: of Σ α·CE + β·NLL, ``[n, N]``, by s·c under worth ``exp`` and by c under others; None where
            none is wanted or both weights are missing.
    """

    cross_entropy: Tensor | None
    nll: Tensor | None
    gradient: Tensor | None

    def halves(self) -> tuple[Evaluated, Evaluated]:
        """The two blocks of :meth:`Block.above`."""
        first, second = zip(*((None, None) if x is None else x.chunk(2) for x in self), strict=True)
        return Evaluated(*first), Evaluated(*second)


def evaluate(block: Block, options: RankOptions, plan: Plan, *, with_gradient: bool) -> Evaluated:
    """Values, and the gradient where it is wanted, of a block of lists, some of its rows at a time."""
    if block.alpha is None and block.beta is None:
        return Evaluated(None, None, None)
    if plan.kernel == "triton" and block.beta is not None:
        return _evaluate_in_kernel(block, options, with_gradient)
    if block.reference is not None and block.first_equal is not None:
        block = block._replace(reference=block.exact_reference(), first_equal=None, owns_reference=True)
    evaluate_lists = _evaluate if options.diagonal or block.reference is None else _evaluate_others
    return evaluate_lists(block, options, plan, with_gradient)


def _evaluate_in_kernel(block: Block, options: RankOptions, with_gradient: bool) -> Evaluated:
    assert block.reference is not None
    assert block.beta is not None
    return Evaluated(
        *kernels.evaluate_rows(
            block.cosines,
            block.reference,
            block.scale,
            _by_row(block.beta),
            alpha=None if block.alpha is None else _by_row(block.alpha),
            first_row=block.first_row,
            first_equal=block.first_equal,
            method=options.method,
            bins=options.bins,
            top_k=options.top_k,
            discount=options.discount,
            diagonal=options.diagonal,
            mean=options.reduction == "mean",
            gradient=with_gradient,
        )
    )


def _by_row(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 0 else weight.squeeze(-1)


def _evaluate(block: Block, options: RankOptions, plan: Plan, with_gradient: bool) -> Evaluated:
    gradient: Tensor | None = None
    if with_gradient:
        # A row's reference has served once the row is ranked.
        gradient = block.reference if block.owns_reference else torch.empty_like(block.cosines)
    values = []
    for rows, ranking in _ranked(block, options, plan):
        part, out = block.rows(rows), None if gradient is None else gradient[rows]
        by_sums = _by_sums(part, ranking, options, out)
        values.append(_by_definition(part, options, out) if by_sums is None else by_sums)
    cross_entropy, nll = (None if x[0] is None else _joined(x) for x in zip(*values, strict=True))
    return Evaluated(cross_entropy, nll, gradient)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ranked(block: Block, options: RankOptions, plan: Plan) -> Iterator[tuple[slice, Ranking | None]]:
    if block.reference is None or options.model == "top_one":
        return ((rows, None) for rows in slices(len(block.cosines), plan.slice_size))
    return rankings(block.reference, options, block.shuffle, plan)


def _evaluate_others(block: Block, options: RankOptions, plan: Plan, with_gradient: bool) -> Evaluated:
    """With ``diagonal=False``: the cross-entropy is of all items, the lists are of all but the own pair."""
    assert block.reference is not None
    assert block.own is not None
    of_all = block._replace(beta=None, reference=None, owns_reference=False)
    cross_entropy, _, gradient = evaluate(of_all, options, plan, with_gradient=with_gradient)
    others = other_items(block.own, block.cosines.shape[-1])
    of_others = block._replace(
        cosines=block.cosines.gather(-1, others),
        reference=block.reference.gather(-1, others),
        alpha=None,
        owns_reference=True,
    )
    _, nll, by_others = _evaluate(of_others, options, plan, with_gradient)
    if by_others is not None:
        by_all = torch.zeros_like(block.cosines).scatter_(-1, others, by_others)
        gradient = by_all if gradient is None else gradient.add_(by_all)
    return Evaluated(cross_entropy, nll, gradient)


class _Worths(NamedTuple):
    """Worths w = values · e^shift of a block of lists."""

    values: Tensor
    shift: Tensor | float
    log: Tensor | None  # ℓ = log w; None where it is s·c and is not kept

    def below_shift(self, cosines: Tensor, scale: Tensor) -> Tensor:
        """The differences shift − ℓ."""
        if self.log is not None:
            return self.shift - self.log
        assert isinstance(self.shift, Tensor)
        return torch.addcmul(self.shift, cosines, scale, value=-1)

    def sum_of_log(self, cosines: Tensor, scale: Tensor) -> Tensor:
        """Σ ℓ of every list."""
        if self.log is not None:
            return self.log.sum(-1)
        return cosines.sum(-1, dtype=self.values.dtype) * scale


def _worths(block: Block, cosines: Tensor, options: RankOptions) -> _Worths | None:
    """The worths in float32 where their span permits it, else in float64; None where that is too narrow.

    Scores of unit-norm features span 2·scale nats at most: 200 at CLIP's largest scale, of float64's 1,360.
    Looking at the span would make an accelerator's host wait, so there it is float64 from the start, and a
    list that it does not hold becomes NaN. ``cosines`` are the block's, in the order of the ranking.
    """
    if options.worth != "exp":
        log = log_worth(cosines, options.worth)
        values = (1 + cosines) / 2 if options.worth == "shifted" else cosines
        return _Worths(values.masked_fill(log.isnan(), torch.nan), 0.0, log)
    if block.beta is not None and not may_look_at(cosines):
        lowest, highest = torch.stack(extremes(cosines)).double() * block.scale
        shift = torch.lerp(lowest, highest, 0.5)
        shift = shift.masked_fill(highest - lowest > 2 * _REACH[torch.float64], torch.nan)
        return _Worths(torch.addcmul(-shift, cosines, block.scale).exp_(), shift, None)
    scores = cosines * block.scale
    if block.beta is None:  # a softmax: what is lost beside the largest worth is less than a rounding
        highest = scores.amax(-1, keepdim=True)
        return _Worths((scores - highest).exp_(), highest, scores)
    lowest, highest = extremes(scores)
    shift = torch.lerp(lowest, highest, 0.5)
    largest = (highest - lowest).amax().item()
    if scores.dtype == torch.float32 and largest <= 2 * _REACH[torch.float32]:
        return _Worths((scores - shift).exp_(), shift, scores)
    if not largest <= 2 * _REACH[torch.float64]:  # also where there is a NaN
        return None
    return _Worths((scores - shift.double()).exp_(), shift, scores)


_Values: TypeAlias = tuple[Tensor | None, Tensor | None]


def _by_sums(
    block: Block, ranking: Ranking | None, options: RankOptions, out: Tensor | None
) -> _Values | None:
    """CE and NLL; the gradient is written to ``out``. None where float64 does not hold the worths."""
    order = None if ranking is None else ranking.order
    cosines = block.cosines if order is None else block.cosines.gather(-1, order)
    worths = _worths(block, cosines, options)
    if worths is None:
        return None
    w, shift = worths.values, worths.shift
    alpha, beta = block.alpha, block.beta
    cross_entropy = nll = mu = None
    denominators = None if ranking is None else ranking.denominators(w)
    total = w.sum(-1, keepdim=True, dtype=torch.float64) if denominators is None else denominators[..., -1:]
    bracket: Tensor | None = None
    if alpha is not None:
        assert block.own is not None
        own = block.cosines.gather(-1, block.own[:, None])
        own = (own.double() if worths.log is None else own) * block.scale  # as the worths are made
        cross_entropy = (total.log() + shift - own).squeeze(-1)
        bracket = alpha / total
    if beta is not None and options.model == "top_one":
        assert block.reference is not None
        p = top_one_probabilities(block.reference, block.scale, options)
        nll = (p * (total.log() + worths.below_shift(cosines, block.scale))).sum(-1)
        bracket = beta / total if bracket is None else bracket + beta / total
        share: Tensor | None = -beta.to(p.dtype) * p
    elif beta is not None:
        assert ranking is not None
        assert denominators is not None
        # C is summed from shifted worths, so every −μ·ℓ becomes μ·(shift − ℓ).
        if ranking.mu is None:
            nll = -worths.sum_of_log(cosines, block.scale).double()
            if isinstance(shift, Tensor):
                nll.add_(shift.squeeze(-1), alpha=cosines.shape[-1])
        else:
            mu = ranking.of_items(ranking.mu).to(w.dtype)
            nll = (mu * worths.below_shift(cosines, block.scale)).sum(-1, dtype=torch.float64)
        del cosines, worths  # what follows takes most of the memory
        nll += ranking.log_denominators(denominators, narrow=w.dtype == torch.float32)
        if options.reduction == "mean":
            nll = (nll[:, None] / ranking.total_mu).squeeze(-1)
            beta = beta / ranking.total_mu
        if out is not None:
            shares = ranking.shares(denominators)
            del denominators, total
            suffix = ranking.suffix(shares)
            del shares
            by_slot = (
                suffix.mul_(beta) if bracket is None else torch.addcmul(bracket, suffix, beta, out=suffix)
            )
            bracket = ranking.of_items(by_slot.to(w.dtype))
        share = -beta.to(w.dtype) if mu is None else -beta.to(w.dtype) * mu
    else:
        share = None
    if out is not None:
        assert bracket is not None
        _write_gradient(block, w, bracket.to(w.dtype), share, order, options, out)
    return cross_entropy, nll


def _write_gradient(
    block: Block,
    worths: Tensor,
    bracket: Tensor,
    share: Tensor | None,
    order: Tensor | None,
    options: RankOptions,
    out: Tensor,
) -> None:
    """w·bracket + share, written back from the order of the ranking, less α at the own pair."""
    arranged = out if order is None else torch.empty_like(out)
    if share is None:
        torch.mul(worths, bracket, out=arranged)
    else:
        torch.addcmul(share, worths, bracket, out=arranged)
    if order is not None:
        out.scatter_(-1, order, arranged)
    if block.alpha is not None:
        assert block.own is not None
        own = block.own[:, None]
        out.scatter_(-1, own, out.gather(-1, own) - block.alpha.to(out.dtype))
    slope = log_worth_slope(block.cosines, options.worth)
    if slope is not None:
        out *= slope


def _by_definition(block: Block, options: RankOptions, out: Tensor | None) -> _Values:
    """The same for worths that float64 does not hold side by side."""
    x = scores_from(block.cosines, block.scale, options)

    def values(x: Tensor) -> tuple[Tensor, ...]:
        found = []
        if block.alpha is not None:
            assert block.own is not None
            found.append(F.cross_entropy(x, block.own, reduction="none"))
        if block.reference is not None:
            found.append(list_terms(x, block.reference, block.scale, options, block.shuffle).sum(-1))
        return tuple(found)

    # torch.func, since an operator runs below autograd.
    found, vjp, *_ = torch.func.vjp(values, x)
    if out is not None:
        weights = (w for w in (block.alpha, block.beta) if w is not None)
        (gradient,) = vjp(tuple(w.to(x.dtype).expand(len(x), 1).squeeze(-1) for w in weights))
        out.copy_(gradient)
    remaining = iter(found)
    return (
        None if block.alpha is None else next(remaining),
        None if block.beta is None else next(remaining),
    )
