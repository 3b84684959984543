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
from rankloss.batch import other_items
from rankloss.likelihood import (
    list_terms,
    log_worth,
    log_worth_slope,
    scores_from,
    top_one_probabilities,
)
from rankloss.options import Plan, RankOptions
from rankloss.precision import may_look_at
from rankloss.ranking import Ranking, extremes, rankings, slices

__all__ = ["Block", "Evaluated", "evaluate"]

# How far log worths may reach from the middle of their range, in nats: summed over 10⁵ items and multiplied
# by as much again, e^±70 in float32 and e^±680 in float64 neither overflow nor lose bits.
_REACH = {torch.float32: 70.0, torch.float64: 680.0}


class Block(NamedTuple):
    """Some rows of one matrix, or of several, and all that their values and gradient depend on.

    Attributes:
        cosines: the similarities c, ``[n, N]``.
        scale: s, ``[]``.
        alpha: weight of the cross-entropy, ``[]`` or ``[n, 1]``; None leaves it out.
        beta: weight of the ranking's NLL, likewise; None leaves it out.
        reference: the cosines that the lists are ranked by, ``[n, N]``; None without beta.
        first_equal: ``[N]``, the first item equal to item j, whose reference counts; None where no two are.
            ``[2, N]``: one for the references of the first half of the lists, one for those of the second.
        first_row: the column k of the first row's own pair; the next row's is the next.
        shuffle: ``[N]`` under ``ties="random"``; else None.
        matrices: how many the rows belong to, the same rows of each, one matrix below the other.
        opposite: whether the lists of the first matrix are ranked by what stands in the place of the last
            one in the reference, those of the second by the last but one, and so on.
        owns_reference: whether nobody else reads the reference, so that the gradient may take its place.
    """

    cosines: Tensor
    scale: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    reference: Tensor | None = None
    first_equal: Tensor | None = None
    first_row: int = 0
    shuffle: Tensor | None = None
    matrices: int = 1
    opposite: bool = False
    owns_reference: bool = False

    @property
    def own(self) -> Tensor:
        """``[n]``: the column k of every row's own pair."""
        anchors = len(self.cosines) // self.matrices
        own = torch.arange(self.first_row, self.first_row + anchors, device=self.cosines.device)
        return own if self.matrices == 1 else own.repeat(self.matrices)

    def own_entries(self, x: Tensor) -> Tensor:
        """A view of the entries of the own pairs, ``[matrices, n / matrices]``."""
        entries: Tensor = x.unflatten(0, (self.matrices, -1)).diagonal(self.first_row, 1, 2)
        return entries

    def rows(self, rows: slice) -> Block:
        """The same for some of the rows."""
        if rows.stop - rows.start == len(self.cosines):
            return self
        assert self.matrices == 1
        return self._replace(
            cosines=self.cosines[rows],
            alpha=self.alpha if self.alpha is None or self.alpha.dim() == 0 else self.alpha[rows],
            beta=self.beta if self.beta is None or self.beta.dim() == 0 else self.beta[rows],
            reference=None if self.reference is None else self.reference[rows],
            first_row=self.first_row + rows.start,
        )

    def with_exact_reference(self) -> Block:
        """The same with a reference, row by row, in which equal items are tied exactly."""
        if self.reference is None or (self.first_equal is None and not self.opposite):
            return self
        sources = self.reference.unflatten(0, (self.matrices, -1))
        reference = torch.empty_like(self.cosines)
        places = reference.view(sources.shape)
        for k, place in enumerate(places):
            source = sources[self.matrices - 1 - k if self.opposite else k]
            if self.first_equal is None:
                place.copy_(source)
            else:
                equal = self.first_equal
                if equal.dim() > 1:
                    equal = equal[2 * k // self.matrices]
                torch.index_select(source, -1, equal, out=place)
        return self._replace(reference=reference, first_equal=None, opposite=False, owns_reference=True)


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


def evaluate(block: Block, options: RankOptions, plan: Plan, *, with_gradient: bool) -> Evaluated:
    """Values, and the gradient where it is wanted, of a block of lists, some of its rows at a time."""
    if block.alpha is None and block.beta is None:
        return Evaluated(None, None, None)
    if plan.kernel == "triton" and block.beta is not None:
        return _evaluate_in_kernel(block, options, with_gradient)
    block = block.with_exact_reference()
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
            anchors=len(block.cosines) // block.matrices,
            opposite=block.opposite,
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
    """Worths w of a block of lists, as values = w · e^lift."""

    values: Tensor
    lift: Tensor | float
    log: Tensor | None  # ℓ = log w; None where it is s·c and is not kept

    def log_of(self, cosines: Tensor, scale: Tensor) -> Tensor:
        """The logarithms ℓ + lift of the values; all items' in the order of the worths."""
        if self.log is not None:
            return self.log + self.lift
        assert isinstance(self.lift, Tensor)
        return torch.addcmul(self.lift, cosines, scale)

    def sum_of_logs(self, cosines: Tensor, scale: Tensor) -> Tensor:
        """Their sums by list."""
        if self.log is not None:
            total = self.log.sum(-1).double()
        else:
            total = cosines.sum(-1, dtype=self.values.dtype) * scale
        if isinstance(self.lift, Tensor):
            total.add_(self.lift.squeeze(-1), alpha=cosines.shape[-1])
        return total


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
        lowest, highest = extremes(cosines)
        middle = torch.lerp(lowest, highest, 0.5).neg_()
        lift = torch.mul(middle, block.scale, out=middle.new_empty(middle.shape, dtype=torch.float64))
        lift.masked_fill_(highest.sub_(lowest).mul_(block.scale) > 2 * _REACH[torch.float64], torch.nan)
        return _Worths(torch.addcmul(lift, cosines, block.scale).exp_(), lift, None)
    scores = cosines * block.scale
    if block.beta is None:  # a softmax: what is lost beside the largest worth is less than a rounding
        lift = scores.amax(-1, keepdim=True).neg_()
        return _Worths((scores + lift).exp_(), lift, scores)
    lowest, highest = extremes(scores)
    lift = torch.lerp(lowest, highest, 0.5).neg_()
    largest = (highest - lowest).amax().item()
    if scores.dtype == torch.float32 and largest <= 2 * _REACH[torch.float32]:
        return _Worths((scores + lift).exp_(), lift, scores)
    if not largest <= 2 * _REACH[torch.float64]:  # also where there is a NaN
        return None
    return _Worths((scores + lift.double()).exp_(), lift, scores)


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
    w, lift = worths.values, worths.lift
    alpha, beta = block.alpha, block.beta
    cross_entropy = nll = mu = None
    denominators = None if ranking is None else ranking.denominators(w)
    total = w.sum(-1, keepdim=True, dtype=torch.float64) if denominators is None else denominators[..., -1:]
    bracket: Tensor | None = None
    if alpha is not None:
        assert isinstance(lift, Tensor)
        own, log_total = block.own_entries(block.cosines), total.log()
        if worths.log is None:  # as the worths are made
            own = torch.addcmul(lift.view(own.shape), own, block.scale)
        else:
            log_total, own = log_total.sub_(lift), own * block.scale
        cross_entropy = (log_total.view(own.shape) - own).flatten()
        bracket = alpha / total
    if beta is not None and options.model == "top_one":
        assert block.reference is not None
        p = top_one_probabilities(block.reference, block.scale, options)
        nll = (p * (total.log() - worths.log_of(cosines, block.scale))).sum(-1)
        bracket = beta / total if bracket is None else bracket + beta / total
        share: Tensor | None = -beta.to(p.dtype) * p
    elif beta is not None:
        assert ranking is not None
        assert denominators is not None
        # C is summed of lifted worths, so every ℓ is lifted as well.
        if ranking.mu is None:
            logs = worths.sum_of_logs(cosines, block.scale)
        else:
            mu = ranking.of_items(ranking.mu).to(w.dtype)
            logs = (mu * worths.log_of(cosines, block.scale)).sum(-1, dtype=torch.float64)
        del cosines, worths  # what follows takes most of the memory
        nll = ranking.log_denominators(denominators, narrow=w.dtype == torch.float32).sub_(logs)
        if options.reduction == "mean":
            total_mu = ranking.total_mu
            nll /= total_mu.squeeze(-1) if isinstance(total_mu, Tensor) else total_mu
            minus_beta = beta / -total_mu
        else:
            minus_beta = -beta
        if out is not None:
            shares = ranking.shares(denominators)
            del denominators, total
            suffix = ranking.suffix(shares)
            del shares
            if bracket is None:
                by_slot = suffix.mul_(-minus_beta)
            else:
                by_slot = torch.addcmul(bracket, suffix, minus_beta, value=-1, out=suffix)
            bracket = ranking.of_items(by_slot.to(w.dtype))
        share = minus_beta.to(w.dtype) if mu is None else minus_beta.to(w.dtype) * mu
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
        own = block.own_entries(out)
        own.sub_(block.alpha if block.alpha.dim() == 0 else block.alpha.view(own.shape))
    slope = log_worth_slope(block.cosines, options.worth)
    if slope is not None:
        out *= slope


def _by_definition(block: Block, options: RankOptions, out: Tensor | None) -> _Values:
    """The same for worths that float64 does not hold side by side."""
    x = scores_from(block.cosines, block.scale, options)

    def values(x: Tensor) -> tuple[Tensor, ...]:
        found = []
        if block.alpha is not None:
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
