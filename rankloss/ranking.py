r"""Rankings of lists by a reference, and the running sums over a ranking.

With worths w and a reference y, the formula needs, for every counted item,

    C_p = Σ_{q : y_q ≤ y_p} w_q,   U_q = Σ_{p : y_p ≥ y_q} 1 / C_p.

A ranking divides a list into slots, worst first. C and U are running sums over slots. The weight of a slot is
the number of its items. A sorted list has one slot per item, and the last of tied items has the weight of all
(:class:`Sorted`). A binned list has one slot per bin (:class:`Binned`), a selection one slot per selected
item after one for the rest (:class:`Selected`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.options import RankOptions


def rank(reference: Tensor, options: RankOptions, *, by_numpy: bool) -> Ranking:
    """The ranking of lists ``[..., N]`` under ``method``, ``bins`` and ``top_k``, by NumPy or by torch."""
    n_items = reference.shape[-1]
    if options.method == "bin":
        index = quantize(reference, options.bins)
        has_fewer_bins_than_items = options.bins < n_items  # otherwise it takes no fewer slots than items
        if options.top_k is None and has_fewer_bins_than_items:
            return Binned(index, options.bins)
        reference = index.to(reference.dtype)  # exact: bins are at most 2²⁴
    if options.top_k is not None and options.top_k < n_items:
        return Selected(reference, options.top_k)
    return Sorted(reference, by_numpy=by_numpy)


class Ranking:
    """The slots of ranked lists ``[..., N]``.

    Attributes:
        order: ``[..., N]``, the item of every slot, if worths are given and returned in this order; None if
            in the items' order.
        counted: ``[..., N]``, True for counted items; None if all items count.
        items: the number of counted items.
        sizes: ``[..., slots]``, the number of items of each slot.
    """

    order: Tensor | None = None
    counted: Tensor | None = None
    items: int | Tensor
    sizes: Tensor

    def denominators(self, worths: Tensor) -> Tensor:
        """C by slot; the last is the sum of all worths. The worths are not changed."""
        return worths.cumsum(-1)

    def logs_by_slot(self, scores: Tensor) -> LogsBySlot:
        """The logarithms of the sums of worths e^x of every slot."""
        return LogsBySlot(scores, scores, None)

    def weigh(self, by_slot: Tensor) -> Tensor:
        """``by_slot`` times the number of items of each slot; a float64 argument may be overwritten."""
        return by_slot * self.sizes

    def read_items(self, by_slot: Tensor) -> Tensor:
        """The value of every item's slot."""
        return by_slot


class LogsBySlot(NamedTuple):
    """Logarithms of the sums of worths of every slot.

    Attributes:
        sums: ``[..., slots]``.
        base: ``[..., slots]``, the logarithm of the worth that an item's is relative to.
        relative: ``[..., N]``, every item's worth divided by its slot's base; None if all are 1.
    """

    sums: Tensor
    base: Tensor
    relative: Tensor | None


class Sorted(Ranking):
    """Lists in the exact order of their references, one slot per item.

    The last slot of tied items has the weight of all, the other slots have none: its C is that of the whole
    group, and every item of the group gets its share of U.
    """

    def __init__(self, reference: Tensor, *, by_numpy: bool) -> None:
        ordered, self.order = ascending(reference, by_numpy=by_numpy)
        self.items = reference.shape[-1]
        self._tied = tied_places(ordered) if by_numpy else None
        if not by_numpy:
            self.sizes = run_lengths(ordered)

    def weigh(self, by_slot: Tensor) -> Tensor:
        """As :meth:`Ranking.weigh`; NumPy overwrites ``by_slot``, at the few sizes that differ from 1."""
        if self._tied is None:
            return by_slot * self.sizes
        places, sizes = self._tied
        by_slot.view(-1)[places] *= sizes
        return by_slot


class Binned(Ranking):
    """Lists ranked by the bins of their references (:func:`quantize`), one slot per bin, its items tied."""

    def __init__(self, index: Tensor, bins: int) -> None:
        self.items = index.shape[-1]
        self._index = index
        self._bins = bins
        one = torch.ones((), dtype=torch.float32, device=index.device)
        ones = one.expand_as(index)  # for each item, without memory of their own
        self.sizes = self._by_bin(ones)

    def denominators(self, worths: Tensor) -> Tensor:
        """As :meth:`Ranking.denominators`; bin 0 is never empty, so none is 0."""
        return self._by_bin(worths).cumsum_(-1)

    def logs_by_slot(self, scores: Tensor) -> LogsBySlot:
        """As :meth:`Ranking.logs_by_slot`, relative to the largest worth of each bin."""
        largest = self._filled(scores, -math.inf).scatter_reduce_(-1, self._index, scores, "amax")
        relative = self.read_items(largest)
        torch.sub(scores, relative, out=relative).exp_()
        return LogsBySlot(self._by_bin(relative).log_().add_(largest), largest, relative)

    def read_items(self, by_slot: Tensor) -> Tensor:
        """As :meth:`Ranking.read_items`."""
        return by_slot.gather(-1, self._index)

    def _by_bin(self, x: Tensor) -> Tensor:
        """The sum over the items of each bin, ``[..., bins]``."""
        return self._filled(x, 0.0).scatter_add_(-1, self._index, x)

    def _filled(self, like: Tensor, value: float) -> Tensor:
        """One number in every bin of every list, ``[..., bins]``."""
        return like.new_full((*like.shape[:-1], self._bins), value)


class Selected(Ranking):
    """Lists of which the ``top_k`` best items count: one slot per selected item, after one for the rest.

    Items tied with the last selected one count, too, without slots of their own. So no shape depends on the
    values.
    """

    def __init__(self, reference: Tensor, top_k: int) -> None:
        best, items = reference.topk(top_k, dim=-1)
        ordered = best.flip(-1)  # worst first
        self._best = items.flip(-1)
        self.counted = reference >= ordered[..., :1]
        self.items = self.counted.sum(-1, keepdim=True, dtype=reference.dtype)
        sizes = run_lengths(ordered)
        # The first run also includes the tied items that were not selected; its last slot has their weight.
        ends_first_run = (ordered == ordered[..., :1]) & (sizes > 0)
        not_selected = self.items - top_k
        sizes = torch.where(ends_first_run, sizes + not_selected, sizes)
        self.sizes = F.pad(sizes, (1, 0))

    def denominators(self, worths: Tensor) -> Tensor:
        """As :meth:`Ranking.denominators`."""
        # Sum the rest directly: a difference would lose small worths.
        others = worths.scatter(-1, self._best, 0).sum(-1, keepdim=True)
        return torch.cat([others, worths.gather(-1, self._best)], -1).cumsum_(-1)

    def logs_by_slot(self, scores: Tensor) -> LogsBySlot:
        """As :meth:`Ranking.logs_by_slot`, relative to the sum of each slot."""
        others = scores.scatter(-1, self._best, -math.inf).logsumexp(-1, keepdim=True)
        sums = torch.cat([others, scores.gather(-1, self._best)], -1)
        return LogsBySlot(sums, sums, (scores - self.read_items(sums)).exp_())

    def read_items(self, by_slot: Tensor) -> Tensor:
        """As :meth:`Ranking.read_items`."""
        assert self.counted is not None
        others = by_slot[..., :1].expand(self.counted.shape)
        return others.scatter(-1, self._best, by_slot[..., 1:])


def run_lengths(ordered: Tensor) -> Tensor:
    """The length of each run of equal values in sorted lists, at its last place, else 0.

    Example:
        >>> run_lengths(torch.tensor([0.1, 0.3, 0.3, 0.7])).tolist()
        [1.0, 0.0, 2.0, 1.0]
    """
    first = torch.searchsorted(ordered, ordered, out_int32=True)
    # A run ends if the next value differs. Otherwise both values have the same first place.
    lengths = torch.empty_like(ordered)
    torch.sub(first[..., 1:], first[..., :-1], out=lengths[..., :-1])
    lengths[..., -1] = ordered.shape[-1] - first[..., -1]
    return lengths


def tied_places(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Places of tied values in the flattened sorted lists, and their :func:`run_lengths`; on a CPU.

    NumPy compares in a third of torch's time; usually few values are tied.

    Example:
        The places 1, 2 and 5 are tied with the next one. Runs begin at 1 and 5, and end at 3 and 6.

        >>> places, lengths = tied_places(torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.1, 0.3, 0.3, 0.7]]))
        >>> places.tolist(), lengths.tolist()
        ([1, 2, 5, 3, 6], [0.0, 0.0, 0.0, 3.0, 2.0])
    """
    values = ordered.numpy().reshape(-1)
    n_items = ordered.shape[-1]
    is_tied_with_next = values[1:] == values[:-1]
    is_tied_with_next[n_items - 1 :: n_items] = False  # the last of one list and the first of the next
    tied = np.flatnonzero(is_tied_with_next)
    is_other_run = np.diff(tied) > 1  # between a tied place and the next one in ``tied``
    outermost = np.ones(min(1, len(tied)), dtype=bool)  # the first place begins a run, the last ends one
    begins = tied[np.concatenate([outermost, is_other_run])]
    ends = 1 + tied[np.concatenate([is_other_run, outermost])]
    places = np.concatenate([tied, ends])
    lengths = np.concatenate([np.zeros(len(tied)), ends - begins + 1])
    return torch.from_numpy(places), torch.from_numpy(lengths)


# --- running sums -----------------------------------------------------------------------------------------


class WorthSums:
    """C and U of a ranking as running sums of worths in float64, for scores of up to ±680 nats.

    Attributes:
        log_sum: log Σ e^x, ``[..., 1]``.
    """

    def __init__(self, ranking: Ranking, scores: Tensor) -> None:
        """Scores in the order of ``ranking.order``, of the items without it; they are overwritten."""
        counted_scores = scores if ranking.counted is None else scores * ranking.counted
        self._ranking = ranking
        self._counted_scores = counted_scores.sum(-1, keepdim=True)
        self._worths = scores.exp_()
        self._denominators = ranking.denominators(self._worths)
        self.log_sum = self._denominators[..., -1:].log()

    def nll(self) -> Tensor:
        """``Σ_p (log C_p − x_p)``, ``[..., 1]``."""
        by_slot = self._ranking.weigh(self._denominators.log())
        return by_slot.sum(-1, keepdim=True).sub_(self._counted_scores)

    def gradient(self, share: Tensor, of_all: Tensor | None, out: Tensor) -> None:
        """Write ``share``·(e^x·U − [counts]) + ``of_all``·e^x / Σ e^x of every item, in the scores' order.

        To be called last: it overwrites the denominators.
        """
        ranking = self._ranking
        slope_of_all = None if of_all is None else of_all / self._denominators[..., -1:]
        by_slot = ranking.weigh(torch.div(share, self._denominators, out=self._denominators))
        if slope_of_all is not None:
            by_slot[..., -1:] += slope_of_all  # every item's sum runs over the last slot
        from_best = by_slot.flip(-1).cumsum_(-1).flip(-1)  # Σ of this slot and all better ones
        slopes = ranking.read_items(from_best)
        counted = share if ranking.counted is None else share * ranking.counted
        torch.addcmul(-counted, self._worths, slopes, out=out)


class LogSums:
    """C and U of a ranking as running sums of logarithms: in any dtype, for scores any distance apart.

    Attributes:
        log_sum: log Σ e^x, ``[..., 1]``.
    """

    def __init__(self, ranking: Ranking, scores: Tensor) -> None:
        counted = scores if ranking.counted is None else scores * ranking.counted
        self._ranking = ranking
        self._mean = counted.sum(-1, keepdim=True) / ranking.items
        self._slots = ranking.logs_by_slot(scores)
        self._logs = self._slots.sums.logcumsumexp(-1)
        self.log_sum = self._logs[..., -1:].clone()  # a view would keep all

    def nll(self) -> Tensor:
        """``Σ_p (log C_p − x_p)``, ``[..., 1]``; most summands are small relative to the mean score."""
        return self._ranking.weigh(self._logs - self._mean).sum(-1, keepdim=True)

    def gradient(self, share: Tensor, of_all: Tensor | None, out: Tensor) -> None:
        """Write ``share``·(e^x·U − [counts]) + ``of_all``·e^x / Σ e^x of every item, in the scores' order.

        To be called last: it overwrites the sizes of the slots.
        """
        relative = self._slots.relative
        if relative is None:  # every slot is an item
            torch.addcmul(-share, share, self._slopes(), out=out)
            if of_all is not None:
                out.addcmul_(of_all, self._shares())
            return
        slopes = self._slopes().mul_(share)
        if of_all is not None:
            slopes.addcmul_(of_all, self._shares())
        counted = share if self._ranking.counted is None else share * self._ranking.counted
        torch.addcmul(-counted, relative, self._ranking.read_items(slopes), out=out)

    def _slopes(self) -> Tensor:
        """U times the base of every slot."""
        log_sizes = self._ranking.sizes.to(self._logs.dtype).log_()
        log_terms = log_sizes.sub_(self._logs)  # of size / C
        log_from_best = log_terms.flip(-1).logcumsumexp(-1).flip(-1)  # log Σ of this slot and all better ones
        return log_from_best.add_(self._slots.base).exp_()

    def _shares(self) -> Tensor:
        """The base of every slot divided by Σ e^x."""
        return (self._slots.base - self.log_sum).exp_()


# --- bins -------------------------------------------------------------------------------------------------


def quantize(reference: Tensor, bins: int) -> Tensor:
    r"""The bin of every item, counted from 0 for the worst.

        b_q = min(⌊(y_q − min y) / width⌋, bins − 2),   bins − 1 where y_q = max y,

    with width = (y″ − min y) / (bins − 1) and y″ the largest y below the maximum. The best item alone has the
    last bin, since it is usually the anchor's own pair, far above all others; the other bins divide the range
    of the rest evenly. An item's bin never decreases with its y: a list ranked by b differs from one ranked
    by y only by ties within bins. Its NLL is larger, by no more than

        0 ≤ NLL(x | b) − NLL(x | y) ≤ Σ_k (n_k − 1) · log[(B_k + Σw) / (B_k + min w)],

    with n_k, Σw and min w the number, the sum and the smallest of the worths in bin k, and B_k the sum of the
    worths below bin k. docs/performance.md has the measured error of the gradient: under 1 % with 640 bins
    and 512 dimensions.

    Args:
        reference: ``[..., N]``, floating point.
        bins: the number of bins, at least 2.

    Returns:
        ``[..., N]``, int64, in [0, bins).

    Example:
        >>> quantize(torch.tensor([0.1, 0.5, 0.45, 0.9]), bins=4).tolist()
        [0, 2, 2, 3]
    """
    reference = reference.detach()
    lowest = reference.amin(-1, keepdim=True)
    highest = reference.amax(-1, keepdim=True)
    limits = torch.finfo(reference.dtype)
    lowest.clamp_(limits.min, limits.max)  # differences of infinities are avoided
    # Neither the best items nor NaN, nor items of a list with NaN, are other items.
    is_other = reference < highest
    second = torch.where(is_other, reference, lowest).amax(-1, keepdim=True)
    # A list whose other items are all tied has no range.
    width = (second - lowest).div_(bins - 1).clamp_(limits.tiny, limits.max)
    bin_of_other = (reference - lowest).div_(width).clamp_(0, bins - 2)
    has_order = highest.gt_(lowest)  # 1, or 0 if all items of the list are tied; it overwrites the highest
    bin_of_best = has_order.mul_(bins - 1)
    return torch.where(is_other, bin_of_other, bin_of_best).long()


# --- sorting ----------------------------------------------------------------------------------------------

_INDEX_BITS = 29  # of a float64's significand, zero in a float32
_OFF_ZERO = 2.0**-300  # below half a unit in the last place of every float32 but 0


def ascending(x: Tensor, *, by_numpy: bool) -> tuple[Tensor, Tensor]:
    """``x.sort(-1)``: values and indices. Equal values may come in any order, always the same one.

    On a CPU, torch sorts keys and indices side by side, without vector instructions. A float32 leaves 29 bits
    of a float64 unused, so on a CPU every value is widened, its index is written into these bits, and NumPy's
    vectorised sort moves both at once, in a third of the time.

    Args:
        x: ``[..., N]``, finite. With NaN or infinity in a row its order is undefined.
        by_numpy: True on a CPU, False elsewhere.

    Example:
        >>> values, indices = ascending(torch.tensor([[0.5, -1.0, 0.0]]), by_numpy=True)
        >>> values.tolist(), indices.tolist()
        ([[-1.0, 0.0, 0.5]], [[1, 2, 0]])
    """
    # Less than half a unit in the last place of a float32, so that rounding removes the index again.
    is_index_small = x.shape[-1] < 2 ** (_INDEX_BITS - 1)
    leaves_bits_for_index = x.dtype == torch.float32 and is_index_small
    if not (by_numpy and leaves_bits_for_index):
        values, indices = x.sort(dim=-1)
        return values, indices
    # An index in the bits of 0.0 would be a subnormal number, which some processors flush to 0.
    keys = x.to(torch.float64, memory_format=torch.contiguous_format).add_(_OFF_ZERO)
    bits = keys.view(torch.int64)
    bits.bitwise_or_(torch.arange(x.shape[-1], device=x.device))
    keys.numpy().sort(axis=-1)
    values = keys.float()  # rounded, without the index
    indices = bits.bitwise_and_(2**_INDEX_BITS - 1)
    return values, indices
