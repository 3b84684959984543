r"""The running sums of a block of lists: what their value and their gradient are made of.

With worths w, ℓ = log w and a ranking y,

    C_p = Σ_{q : y_q ≤ y_p} w_q,   U_q = Σ_{p : y_p ≥ y_q} μ_p / C_p,
    NLL = Σ_p μ_p·(log C_p − ℓ_p),   ∂NLL/∂ℓ_q = w_q·U_q − μ_q.

A ranking divides a list into slots, worst first, and both sums run over slots. :class:`SortedSlots` gives
every item a slot of its own, :class:`BinnedSlots` every bin of a quantised reference. The sums are plain
ones, in float64, of worths that are shifted into its range; this is several times faster than sums in log
space, and as exact, as long as the worths of one list do not span more than :func:`shifted_worths` allows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rankloss.bins import quantize
from rankloss.options import RankOptions, Worth
from rankloss.ordering import ascending
from rankloss.plackett_luce import log_worth, shuffled_order, weights_of_ranks
from rankloss.ties import group_bounds

__all__ = ["BinnedSlots", "Ranking", "Slots", "SortedSlots", "Worths", "rank", "shifted_worths"]

# How far log worths may reach from the middle of their range, in nats: summed over 10⁵ items and multiplied
# by as much again, e^±75 in float32 and e^±690 in float64 neither overflow nor lose bits.
_REACH = {torch.float32: 75.0, torch.float64: 690.0}


class Worths(NamedTuple):
    """Worths w = values · e^shift of a block of lists, and ℓ = log w."""

    values: Tensor
    log: Tensor
    shift: Tensor | float


def shifted_worths(cosines: Tensor, scale: Tensor | float, worth: Worth) -> Worths | None:
    """The worths in float32 where their span permits it, else in float64; None where that is too narrow.

    Scores of unit-norm features span 2·scale nats at most: 200 at CLIP's largest scale, of float64's 1,380.
    Looking at the span would make an accelerator's host wait, so there it is float64 from the start, and a
    list that it does not hold becomes NaN.

    Args:
        cosines: ``[n, N]``.
        scale: what they are multiplied by under worth ``exp``.
        worth: see :func:`rankloss.plackett_luce_nll`.
    """
    if worth != "exp":
        values = (1 + cosines) / 2 if worth == "shifted" else cosines
        return Worths(values, log_worth(cosines, worth), 0.0)
    scores = cosines * scale
    # Not aminmax, which on a CPU takes ten times as long as the two together.
    lowest, highest = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    span, shift = highest - lowest, (highest + lowest) / 2
    if scores.device.type == "cpu":
        largest = span.amax().item()
        if scores.dtype == torch.float32 and largest <= 2 * _REACH[torch.float32]:
            return Worths((scores - shift).exp_(), scores, shift)
        if not largest <= 2 * _REACH[torch.float64]:  # also where there is a NaN
            return None
    else:
        shift = shift.where(span <= 2 * _REACH[torch.float64], torch.nan)
    return Worths((scores.double() - shift).exp_(), scores, shift)


class Slots(Protocol):
    """The lists' sums by slot."""

    mu: Tensor | None
    """μ of the items in every slot; None where all are 1."""

    @property
    def log_denominators(self) -> Tensor:
        """Σ_p μ_p·log C_p of every list."""

    @property
    def suffix(self) -> Tensor:
        """U of the items in every slot."""

    def of_items(self, by_slot: Tensor) -> Tensor:
        """What a slot holds, for every item of the list in its own place."""


class Ranking(Protocol):
    """A block of references, ready to be summed over; made once, then used a slice of rows at a time."""

    @property
    def reference(self) -> Tensor:
        """``[n, N]``, what the lists are ranked by."""

    @property
    def shuffle(self) -> Tensor | None:
        """What tied items are ordered by; None where they share their place."""

    def rows(self, rows: slice) -> Ranking:
        """Of some of the lists."""

    def slots(self, values: Tensor) -> Slots:
        """The sums of these worths, ``[n, N]``."""


def rank(reference: Tensor, options: RankOptions, shuffle: Tensor | None, bins: int | None) -> Ranking:
    """Rank a block of lists.

    Args:
        reference: ``[n, N]``, float32 or float64.
        options: of the lists.
        shuffle: what :func:`rankloss.plackett_luce.random_shuffle` gave for them.
        bins: rank by so many bins of the reference; None by its exact order.
    """
    if bins is not None:
        return _BinnedRanking(reference, options, bins)
    if shuffle is not None:
        return _SortedRanking(reference, options, shuffled_order(reference, shuffle), None, shuffle)
    ordered, order = ascending(reference)
    return _SortedRanking(reference, options, order, ordered, None)


class _SortedRanking(NamedTuple):
    """Sorted as a whole, since short sorts do not keep the cores busy."""

    reference: Tensor
    options: RankOptions
    order: Tensor
    ordered: Tensor | None  # the sorted values, which show the ties; None where no items count as tied
    shuffle: Tensor | None

    def rows(self, rows: slice) -> _SortedRanking:
        ordered = None if self.ordered is None else self.ordered[rows]
        return self._replace(reference=self.reference[rows], order=self.order[rows], ordered=ordered)

    def slots(self, values: Tensor) -> SortedSlots:
        return SortedSlots(values, self.order, self.ordered, self.options)


class _BinnedRanking(NamedTuple):
    """Divided into bins when a slice's turn comes, so that the bins' numbers stay in a core's cache."""

    values: Tensor
    options: RankOptions
    bins: int
    shuffle: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        return quantize(self.values, self.bins)

    def rows(self, rows: slice) -> _BinnedRanking:
        return self._replace(values=self.values[rows])

    def slots(self, values: Tensor) -> BinnedSlots:
        return BinnedSlots(values, self.reference, self.options, self.bins)


class SortedSlots:
    """One slot an item, in the exact order of the reference."""

    def __init__(self, values: Tensor, order: Tensor, ordered: Tensor | None, options: RankOptions) -> None:
        self._order, self._groups = order, None if ordered is None else _tie_groups(ordered)
        self._denominators = values.gather(-1, order).cumsum(-1, dtype=torch.float64)
        self._narrow = values.dtype == torch.float32
        self.mu: Tensor | None = None
        if options.weighs_ranks:
            self.mu = weights_of_ranks(torch.arange(order.shape[-1], 0, -1, device=values.device), options)
        if self._groups is not None:
            self._denominators = self._groups.at_last(self._denominators)
            if self.mu is not None:  # tied items share their best rank
                self.mu = self._groups.at_last(self.mu.expand(order.shape).contiguous())

    @property
    def log_denominators(self) -> Tensor:
        """Σ_p μ_p·log C_p of every list."""
        if self.mu is not None:
            return torch.sum(self._denominators.log() * self.mu, -1)
        sums, quarter = self._denominators, self._denominators.shape[-1] // 4
        if not self._narrow or quarter == 0:
            return sums.log().sum(-1)
        # log is what costs here: one of four factors, whose product float64 holds where float32 holds each.
        product = sums[..., :quarter] * sums[..., quarter : 2 * quarter]
        for k in (2, 3):
            product *= sums[..., k * quarter : (k + 1) * quarter]
        return product.log_().sum(-1) + sums[..., 4 * quarter :].log().sum(-1)

    @functools.cached_property
    def suffix(self) -> Tensor:
        """U of the items in every slot."""
        shares = self._denominators.reciprocal() if self.mu is None else self.mu / self._denominators
        sums = _suffix_sum(shares)
        return sums if self._groups is None else self._groups.at_first(sums)

    def of_items(self, by_slot: Tensor) -> Tensor:
        """What a slot holds, for every item of the list in its own place."""
        by_slot = by_slot.expand(self._order.shape)
        return torch.empty_like(by_slot).scatter_(-1, self._order, by_slot)


class BinnedSlots:
    """One slot a bin of the quantised reference; the items of a bin are tied."""

    def __init__(self, values: Tensor, index: Tensor, options: RankOptions, bins: int) -> None:
        self._index = index
        of_bins = values.new_zeros(*values.shape[:-1], bins).scatter_add_(-1, index, values)
        self._sums = of_bins.cumsum(-1, dtype=torch.float64)
        count = of_bins.zero_().scatter_add_(-1, index, torch.ones_like(values))
        self.mu: Tensor | None = None
        if options.weighs_ranks:
            above = values.shape[-1] - count.cumsum(-1)  # items in better bins
            self.mu = weights_of_ranks(above + 1, options)
        self._count = count if self.mu is None else count * self.mu  # Σ μ of the bin's items

    @property
    def log_denominators(self) -> Tensor:
        """Σ_p μ_p·log C_p of every list."""
        return (self._sums.log() * self._count).sum(-1)  # bin 0 is never empty, so no sum is 0

    @functools.cached_property
    def suffix(self) -> Tensor:
        """U of the items in every slot."""
        return _suffix_sum(self._count / self._sums)

    def of_items(self, by_slot: Tensor) -> Tensor:
        """What a slot holds, for every item of the list in its own place."""
        return by_slot.gather(-1, self._index)


class _TieGroups(NamedTuple):
    """Bounds of the runs of tied items, in the lists that have any."""

    lists: Tensor | slice
    first: Tensor
    last: Tensor

    def at_first(self, x: Tensor) -> Tensor:
        """``x`` at the first item of every item's run, in place."""
        x[self.lists] = x[self.lists].gather(-1, self.first)
        return x

    def at_last(self, x: Tensor) -> Tensor:
        """``x`` at the last item of every item's run, in place."""
        x[self.lists] = x[self.lists].gather(-1, self.last)
        return x


def _tie_groups(ordered: Tensor) -> _TieGroups | None:
    """Of sorted lists; None where no two items are tied."""
    if ordered.device.type != "cpu":  # to look which lists have ties would wait for the device
        return _TieGroups(slice(None), *group_bounds(ordered))
    # A row of float32 cosines has a tie by accident now and then, most have none.
    lists = (ordered[..., 1:] == ordered[..., :-1]).any(-1).nonzero().squeeze(-1)
    return _TieGroups(lists, *group_bounds(ordered[lists])) if len(lists) else None


def _suffix_sum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum_(-1).flip(-1)
