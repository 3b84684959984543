r"""The order, or the bins, of a reference, its ties, and the running sums over it.

With worths w and a ranking y,

    C_p = Σ_{q : y_q ≤ y_p} w_q,   U_q = Σ_{p : y_p ≥ y_q} μ_p / C_p.

A ranking divides a list into slots, worst first, and both sums run over slots: in :class:`Sorted` every item
has a slot of its own, in :class:`Binned` all items of a bin share one, and in :class:`Selected` the best few
have slots of their own, and all that do not count share one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.options import Plan, RankOptions
from rankloss.precision import may_look_at

__all__ = [
    "Binned",
    "Ranking",
    "Selected",
    "Sorted",
    "ascending",
    "extremes",
    "group_bounds",
    "quantize",
    "random_shuffle",
    "rankings",
    "running_sum",
    "running_sum_in_place",
    "shuffled_order",
    "slices",
    "weights_of_ranks",
]


def slices(n: int, size: int) -> Iterator[slice]:
    """``range(n)`` in slices of ``size``, the last one possibly shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def rankings(
    reference: Tensor, options: RankOptions, shuffle: Tensor | None, plan: Plan
) -> Iterator[tuple[slice, Ranking]]:
    """The rankings of a block of lists, a slice of the lists at a time.

    Lists are sorted many at once, since short sorts do not keep the cores busy, and divided into bins few at
    a time, so that the bins' numbers stay in a core's cache. Where few items of a list count, those are
    selected and nothing is sorted.

    Args:
        reference: ``[n, N]``, float32 or float64.
        options: of the lists.
        shuffle: ``[N]`` under ``ties="random"``; else None.
        plan: how many lists to sort at once, and how many a slice has.
    """
    if options.bins_or_none is not None:
        for rows in slices(len(reference), plan.slice_size):
            yield rows, Binned(reference[rows], options)
        return
    if shuffle is None and options.top_k is not None and options.top_k <= reference.shape[-1] // _FEW:
        for rows in slices(len(reference), plan.slice_size):
            yield rows, Selected(reference[rows], options)
        return
    for block in slices(len(reference), plan.ranked_size):
        if shuffle is None:
            ordered, order = ascending(reference[block])
        else:
            ordered, order = None, shuffled_order(reference[block], shuffle)
        for part in slices(len(order), plan.slice_size):
            rows = slice(block.start + part.start, block.start + part.stop)
            ranking = Sorted(order[part], None if ordered is None else ordered[part], options)
            if part.stop == len(order):
                del ordered  # before the sums, which take most of the memory
            yield rows, ranking


_FEW = 8  # top_k is few in a list of this many times as many items


class Sorted:
    """Lists in the exact order of their references; one slot per item.

    Of tied items the last slot has the weight of all, and the others have none: its C is that of the whole
    group, and all of them see its share of U.

    Attributes:
        order: ``[n, N]``, the item of every slot. Sums are taken of items in this order, "arranged".
        mu: ``[n, N]`` or ``[N]``, μ by slot; None where all are 1.
    """

    def __init__(self, order: Tensor, ordered: Tensor | None, options: RankOptions) -> None:
        """``ordered`` holds the sorted references, which show the ties; None where no items count as tied."""
        self.order = order
        rank = torch.arange(order.shape[-1], 0, -1, device=order.device) if options.weighs_ranks else order
        self.mu = self._mu = weights_of_ranks(rank, options, torch.float64)
        self._sizes: Tensor | None = None  # [n, N], of the groups; None where the ties are looked up
        self._ties: _Ties | None = None
        if ordered is None:
            return
        if may_look_at(ordered):
            self._ties = _ties_of(ordered)
            if self._ties is not None and self._mu is not None:
                self.mu = _shared_by_ties(self._mu.expand(order.shape), self._ties)
            return
        self._dtype = ordered.dtype
        self._sizes = _group_sizes(ordered)
        if self._mu is not None:
            self.mu = self._mu[torch.searchsorted(ordered, ordered, right=True) - 1]

    @property
    def total_mu(self) -> Tensor | int:
        """Σ_p μ_p of every list, ``[n, 1]`` or ``[1]``."""
        return self.order.shape[-1] if self.mu is None else self.mu.sum(-1, keepdim=True)

    def denominators(self, worths: Tensor) -> Tensor:
        """C by slot, float64, for arranged worths; the last is the sum of all."""
        return running_sum(worths)

    def log_denominators(self, denominators: Tensor, *, narrow: bool) -> Tensor:
        """Σ_p μ_p·log C_p of every list; ``narrow`` says that float32 would hold every C_p."""
        if self._sizes is not None:
            if self._mu is not None:
                return denominators.log().mul_(self._sizes) @ self._mu
            return _sum_of_logs_in(self._dtype, denominators, self._sizes)
        if self._mu is not None:
            total = denominators.log() @ self._mu
        else:
            total = self._sum_of_logs(denominators, narrow)
        if self._ties is not None:
            list_, slot, size = self._ties
            surplus = denominators[list_, slot].log() * (size - 1)
            total.index_add_(0, list_, surplus if self._mu is None else surplus * self._mu[slot])
        return total

    def _sum_of_logs(self, denominators: Tensor, narrow: bool) -> Tensor:
        quarter = denominators.shape[-1] // 4
        if not narrow or quarter == 0:
            return denominators.log().sum(-1)
        # log is what costs here: one of four factors, whose product float64 holds where float32 holds each.
        product = denominators[..., :quarter] * denominators[..., quarter : 2 * quarter]
        for k in (2, 3):
            product *= denominators[..., k * quarter : (k + 1) * quarter]
        return product.log_().sum(-1) + denominators[..., 4 * quarter :].log().sum(-1)

    def shares(self, denominators: Tensor) -> Tensor:
        """The summands of U by slot, the best first. The denominators are used up, and the ties with them."""
        if self._sizes is not None:
            shares = torch.div(self._sizes, denominators, out=denominators)
            del self._sizes
        else:
            shares = denominators.reciprocal_()
            if self._ties is not None:
                list_, slot, size = self._ties
                shares[list_, slot] *= size
        if self._mu is not None:
            shares *= self._mu
        return shares.flip(-1)

    def suffix(self, shares: Tensor) -> Tensor:
        """U by slot; the shares are used up."""
        return running_sum_in_place(shares).flip(-1)

    def of_items(self, by_slot: Tensor) -> Tensor:
        """What a slot holds, for every arranged item."""
        return by_slot


class Binned:
    """Lists ranked by the bins of their references (:func:`quantize`); one slot per bin, its items tied.

    Attributes:
        order: None: items stay in the order of the list.
        mu: ``[n, bins]``, μ by slot; None where all are 1.
    """

    order = None

    def __init__(self, reference: Tensor, options: RankOptions) -> None:
        self._bins = options.bins
        self._index = quantize(reference, options.bins)
        shape = (*reference.shape[:-1], self._bins)
        count = torch.zeros(shape, dtype=reference.dtype, device=reference.device)
        one = torch.ones((), dtype=reference.dtype, device=reference.device)
        self._count = count.scatter_add_(-1, self._index, one.expand_as(reference))
        self.mu: Tensor | None = None
        if options.weighs_ranks:
            above = reference.shape[-1] - running_sum(self._count)  # items in better bins
            self.mu = weights_of_ranks(above + 1, options, torch.float64)
        self._weight = self._count if self.mu is None else self._count * self.mu  # Σ μ of the bin's items

    @property
    def total_mu(self) -> Tensor | int:
        """Σ_p μ_p of every list, ``[n, 1]``."""
        return self._index.shape[-1] if self.mu is None else self._weight.sum(-1, keepdim=True)

    def denominators(self, worths: Tensor) -> Tensor:
        """C by slot, float64, for worths ``[n, N]``; the last is the sum of all."""
        shape = (*worths.shape[:-1], self._bins)
        of_bins = torch.zeros(shape, dtype=worths.dtype, device=worths.device)
        return running_sum_in_place(of_bins.scatter_add_(-1, self._index, worths).double())

    def log_denominators(self, denominators: Tensor, *, narrow: bool) -> Tensor:  # noqa: ARG002
        """Σ_p μ_p·log C_p of every list; bin 0 is never empty, so no C is 0."""
        is_narrow = self.mu is None and not may_look_at(denominators)
        return _sum_of_logs_in(self._count.dtype if is_narrow else torch.float64, denominators, self._weight)

    def shares(self, denominators: Tensor) -> Tensor:
        """The summands of U by slot, the best first."""
        return (self._weight / denominators).flip(-1)

    def suffix(self, shares: Tensor) -> Tensor:
        """U by slot; the shares are used up."""
        return running_sum_in_place(shares).flip(-1)

    def of_items(self, by_slot: Tensor) -> Tensor:
        """What a slot holds, for every item of the list in its own place."""
        return by_slot.gather(-1, self._index)


class Selected:
    """Lists of which the ``top_k`` best items count: a slot for each of those, after one for all others.

    The items that are tied with the last of them count too, however many they are: of those beyond ``top_k``
    the slot of the first that is selected holds the number, and the denominator. So no shape depends on the
    values.

    Attributes:
        order: None: items stay in the order of the list.
        mu: ``[n, 1 + top_k]``, μ by slot.
    """

    order = None

    def __init__(self, reference: Tensor, options: RankOptions) -> None:
        assert options.top_k is not None
        k = options.top_k
        best, order = reference.topk(k, dim=-1)
        ordered, self._order = best.flip(-1), order.flip(-1)  # worst first
        self._first, self._last = group_bounds(ordered)
        self._is_above = ordered > ordered[..., :1]
        self._counts = reference >= ordered[..., :1]
        mu = weights_of_ranks(torch.arange(k, 0, -1, device=reference.device), options, torch.float64)
        assert mu is not None
        self.mu: Tensor = F.pad(mu.expand(ordered.shape).gather(-1, self._last), (1, 0))
        # How many items have a slot's μ: one each, and at the last value counted all on the first slot.
        count = self._is_above.double()
        count[..., :1] = self._counts.sum(-1, keepdim=True) - count.sum(-1, keepdim=True)
        self._weight = self.mu * F.pad(count, (1, 0))

    @property
    def total_mu(self) -> Tensor:
        """Σ_p μ_p of every list, ``[n, 1]``."""
        return self._weight.sum(-1, keepdim=True)

    def denominators(self, worths: Tensor) -> Tensor:
        """C by slot, float64, for worths ``[n, N]``; that of the last value counted for the uncounted."""
        selected = worths.gather(-1, self._order)
        # Summed without the better items, and not as a difference, in which small worths would be lost.
        rest = worths.scatter(-1, self._order, selected.masked_fill(self._is_above, 0))
        total = rest.sum(-1, keepdim=True, dtype=torch.float64)
        better = running_sum(selected.where(self._is_above, 0)).gather(-1, self._last)
        return torch.cat([total, total + better], -1)

    def log_denominators(self, denominators: Tensor, *, narrow: bool) -> Tensor:  # noqa: ARG002
        """Σ_p μ_p·log C_p of every list."""
        return (denominators.log() * self._weight).sum(-1)

    def shares(self, denominators: Tensor) -> Tensor:
        """The summands of U by slot, the best first."""
        return (self._weight / denominators).flip(-1)

    def suffix(self, shares: Tensor) -> Tensor:
        """U by slot; the shares are used up."""
        sums = running_sum_in_place(shares).flip(-1)
        return torch.cat([sums[..., :1], sums[..., 1:].gather(-1, self._first)], -1)

    def of_items(self, by_slot: Tensor) -> Tensor:
        """What a slot holds, for every item of the list in its own place."""
        by_slot = by_slot.expand(self.mu.shape)
        of_rest = torch.where(self._counts, by_slot[..., 1:2], by_slot[..., :1])
        return of_rest.scatter_(-1, self._order, by_slot[..., 1:])


def _sum_of_logs_in(dtype: torch.dtype, denominators: Tensor, weights: Tensor) -> Tensor:
    """Σ weight·log C of every list, the summands rounded to a dtype, which may be that of the scores."""
    terms = denominators.new_empty(denominators.shape, dtype=dtype)
    if may_look_at(denominators):  # a CPU has vector instructions for the logarithm alone
        torch.log(denominators, out=terms).mul_(weights)
    else:
        torch.xlogy(weights, denominators, out=terms)
    return terms.sum(-1, dtype=torch.float64)


Ranking: TypeAlias = Sorted | Binned | Selected


def weights_of_ranks(rank: Tensor, options: RankOptions, dtype: torch.dtype) -> Tensor | None:
    """The μ of items of these ranks, the best rank being 1; None where all are 1."""
    if not options.weighs_ranks:
        return None
    rank = rank.to(dtype)
    mu = torch.ones_like(rank) if options.discount is None else rank.log1p().reciprocal()
    return mu if options.top_k is None else torch.where(rank <= options.top_k, mu, 0)


def quantize(reference: Tensor, bins: int) -> Tensor:
    r"""The bin of every item, counted from 0 for the worst.

        b_q = min(⌊(y_q − min y) / width⌋, bins − 2),   bins − 1 where y_q = max y,

    with width = (y″ − min y) / (bins − 1) and y″ the largest y below the maximum. The best item has the last
    bin for itself, since as a rule it is the anchor's own pair, which stands far above all others; the other
    bins divide the range of the rest evenly. An item's bin never decreases with its y: a list that is ranked
    by b differs from one ranked by y only in that the items of one bin are tied. Its NLL is the larger one,
    by no more than

        0 ≤ NLL(x | b) − NLL(x | y) ≤ Σ_k (n_k − 1) · log[(B_k + Σw) / (B_k + min w)],

    with n_k, Σw and min w the number, the sum and the smallest of the worths in bin k, and B_k the sum of
    those below it. What this makes of the gradient is measured in docs/performance.md: less than 1 % with
    640 bins and 512 dimensions.

    Args:
        reference: ``[..., N]``, floating point.
        bins: how many, at least 2.

    Returns:
        ``[..., N]``, int64, in [0, bins).

    Example:
        >>> quantize(torch.tensor([0.1, 0.5, 0.45, 0.9]), bins=4).tolist()
        [0, 2, 2, 3]
    """
    reference = reference.detach()
    lowest, highest = extremes(reference)
    limits = torch.finfo(reference.dtype)
    lowest.clamp_(limits.min, limits.max)  # of infinities no difference is taken
    # The best items are no other items, and NaN, and what is beside it, is neither.
    is_other = reference < highest
    last = highest.gt_(lowest).mul_(bins - 1)  # but 0 in a list whose items are all tied
    second = torch.where(is_other, reference, lowest).amax(-1, keepdim=True)
    # A list whose other items are all tied has no range.
    width = (second - lowest).div_(bins - 1).clamp_(limits.tiny, limits.max)
    place = (reference - lowest).div_(width).clamp_(0, bins - 2)
    return torch.where(is_other, place, last).long()


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest entry of every list, ``[..., 1]``."""
    if x.device.type == "cpu":  # where aminmax takes ten times as long as the two together
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least, largest = x.aminmax(dim=-1, keepdim=True)
    return least, largest


def random_shuffle(n: int, device: torch.device, options: RankOptions) -> Tensor | None:
    """The shuffle that ``ties="random"`` puts before the sort; None for shared ties."""
    return torch.randperm(n, device=device) if options.ties == "random" else None


def shuffled_order(reference: Tensor, shuffle: Tensor) -> Tensor:
    """The ascending order of every list, tied items in the order of the shuffle."""
    return shuffle[reference[..., shuffle].argsort(dim=-1, stable=True)]


# --- ties -------------------------------------------------------------------------------------------------


def group_bounds(sorted_values: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index, at every position, of the run of equal values that holds the position.

    Args:
        sorted_values: ``[..., N]``, sorted along the last dimension, in either direction.

    Returns:
        Two integer tensors of the same shape, ``first`` and ``last``.

    Example:
        >>> first, last = group_bounds(torch.tensor([1.0, 2.0, 2.0, 5.0]))
        >>> first.tolist(), last.tolist()
        ([0, 1, 1, 3], [0, 2, 2, 3])
    """
    n = sorted_values.shape[-1]
    index = torch.arange(n, device=sorted_values.device)
    edge = torch.ones_like(sorted_values[..., :1], dtype=torch.bool)
    change = sorted_values[..., 1:] != sorted_values[..., :-1]
    last = torch.where(torch.cat([change, edge], -1), index, n).flip(-1).cummin(-1).values.flip(-1)
    first = torch.where(torch.cat([edge, change], -1), index, 0).cummax(-1).values
    return first, last


# The slots of sorted lists that hold tied items; a list of float32 cosines has few, by accident. Of each such
# slot, ``[slots]``: its list, its place there, and how many items are tied: at the last of a group, else 0.
_Ties: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _ties_of(ordered: Tensor) -> _Ties | None:
    """The ties of lists ``[n, N]``; None where there are none."""
    list_, slot = (ordered[:, 1:] == ordered[:, :-1]).nonzero(as_tuple=True)
    if len(slot) == 0:
        return None
    # These slots hold the same as the next one: each run of them is a group without its last slot.
    is_last = torch.ones_like(slot, dtype=torch.bool)
    torch.logical_or(list_[1:] != list_[:-1], slot[1:] != slot[:-1] + 1, out=is_last[:-1])
    end = is_last.nonzero().squeeze(-1)
    size = end.diff(prepend=end.new_full((1,), -1)) + 1
    return (
        torch.cat([list_, list_[end]]),
        torch.cat([slot, slot[end] + 1]),
        torch.cat([torch.zeros_like(slot), size]),
    )


def _shared_by_ties(mu: Tensor, ties: _Ties) -> Tensor:
    """μ by slot, ``[n, N]``, every group's being that of its last slot."""
    list_, slot, size = ties
    is_last = size > 0
    last = slot[is_last].repeat_interleave(size[is_last] - 1)
    mu = mu.clone(memory_format=torch.contiguous_format)
    mu[list_[~is_last], slot[~is_last]] = mu[list_[~is_last], last]
    return mu


def _group_sizes(ordered: Tensor) -> Tensor:
    """At the last of every run of equal values how many they are, elsewhere 0; int32."""
    first = torch.searchsorted(ordered, ordered, out_int32=True)
    sizes = torch.empty_like(first)
    torch.sub(first[..., 1:], first[..., :-1], out=sizes[..., :-1])
    sizes[..., -1] = ordered.shape[-1] - first[..., -1]
    return sizes


# --- running sums -----------------------------------------------------------------------------------------

_BLOCK = 64


def running_sum(x: Tensor) -> Tensor:
    """``x.cumsum(-1)`` in float64.

    CUDA's cumsum of floating-point numbers is not deterministic, and raises under
    ``torch.use_deterministic_algorithms(True)``; there the sums are taken in blocks, by matrix products.
    """
    return _running_sum_in_blocks(x.double()) if _needs_blocks(x) else x.cumsum(-1, dtype=torch.float64)


def running_sum_in_place(x: Tensor) -> Tensor:
    """The same for float64 that is not needed any more."""
    return _running_sum_in_blocks(x) if _needs_blocks(x) else x.cumsum_(-1)


def _needs_blocks(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def _running_sum_in_blocks(x: Tensor) -> Tensor:
    n = x.shape[-1]
    blocks = F.pad(x, (0, -n % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    inside: Tensor = blocks @ torch.ones(_BLOCK, _BLOCK, dtype=x.dtype, device=x.device).triu()
    totals = inside[..., -1]
    if totals.shape[-1] > 1:
        before = F.pad(_running_sum_in_blocks(totals[..., :-1]), (1, 0))
        inside = inside + before[..., None]
    return inside.flatten(-2)[..., :n]


# --- sorting ----------------------------------------------------------------------------------------------

_INDEX_BITS = 29  # of a float64's significand that a float32 leaves at zero
_OFF_ZERO = 2.0**-300  # below half a unit in the last place of every float32 but 0
_PER_THREAD = 2**16  # elements per thread, below which another thread costs more than it saves
_SHARES = 4  # per thread: torch's own threads may keep a core busy for some time after an operation


def ascending(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.sort(-1)``: values and indices. Equal values may come in any order, always the same one.

    On a CPU, torch sorts keys and indices side by side, without vector instructions. A float32 leaves 29 bits
    of a float64 unused, so there every value is widened, its index is written into these bits, and NumPy's
    vectorised sort moves both at once; sorting takes a third of the time.

    Args:
        x: ``[n, N]``, finite. With NaN or infinity in a row the order of that row means nothing.

    Example:
        >>> values, indices = ascending(torch.tensor([[0.5, -1.0, 0.0]]))
        >>> values.tolist(), indices.tolist()
        ([[-1.0, 0.0, 0.5]], [[1, 2, 0]])
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[-1] >= 2 ** (_INDEX_BITS - 1):
        values, indices = x.sort(dim=-1)
        return values, indices
    # An index in the bits of 0.0 would be a subnormal number, which is 0 where the processor flushes those.
    keys = x.double().add_(_OFF_ZERO)
    bits = keys.view(torch.int64).bitwise_or_(torch.arange(x.shape[-1], device=x.device))
    _sort_rows(keys.numpy())
    # The index is less than half a unit in the last place of a float32, so rounding takes it off again.
    values = keys.float()
    return values, bits.bitwise_and_(2**_INDEX_BITS - 1)


def _sort_rows(keys: np.ndarray) -> None:
    threads = min(torch.get_num_threads(), len(keys), keys.size // _PER_THREAD)
    if threads <= 1:
        keys.sort(axis=-1)
    else:  # NumPy sorts without holding the interpreter's lock
        list(_workers(os.getpid(), threads).map(np.ndarray.sort, np.array_split(keys, _SHARES * threads)))


@functools.lru_cache(maxsize=4)
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool for this process: one that a fork inherits has no threads in it."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"rankloss-sort-{process}")
