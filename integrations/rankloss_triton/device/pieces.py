"""Device functions of both kernels of lists.

Running sums are kept as pairs (m, w) that stand for w·eᵐ with m the largest exponent so far. Joining two
pairs takes the larger m, so a sum neither overflows nor loses its largest terms however far apart the
exponents are, which a plain float32 sum does beyond 88 nats.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-3.0e38)  # the m of an empty sum: finite, since −inf − (−inf) would be NaN
LARGEST = tl.constexpr(1.0e38)  # a row that holds more is NaN: differences of its entries could overflow
SMALLEST_NORMAL = tl.constexpr(1.1754944e-38)  # of float32


@triton.jit
def joined(m1, w1, m2, w2):
    """The sum of two pairs."""
    m = tl.maximum(m1, m2)
    return m, w1 * tl.exp(m1 - m) + w2 * tl.exp(m2 - m)


@triton.jit
def log_of(m, w):
    """The logarithm of a sum; NONE of an empty one."""
    return m + tl.log(tl.where(w > 0, w, 1.0))


@triton.jit
def reference_row(row, anchor, n, anchors, OPPOSITE: tl.constexpr):
    """The row of the block that ranks the list of a row: the same, or that of the opposite matrix.

    Matrix k of m has the anchor's list in row k·anchors + anchor; the opposite one is m − 1 − k, and n is
    m·anchors.
    """
    if OPPOSITE:
        row = n - anchors + 2 * anchor - row
    return row


@triton.jit
def next_row(row, ranked_by, n, anchors, OPPOSITE: tl.constexpr):
    """The row of the same anchor that comes next.

    Two lists that rank each other follow one another, since they read the same two rows: the second time
    those are in the cache. Of four matrices the order is 0, 3, 1, 2.
    """
    if OPPOSITE:  # after a row of the first half of the matrices its opposite, then the next of this half
        return tl.where(row < n // 2, ranked_by, ranked_by + anchors)
    return row + anchors


@triton.jit
def at(index, x, place):
    """The entry of a block x at one place, given the indices of its entries."""
    return tl.sum(tl.where(index == place, x, tl.zeros_like(x)), 0)


@triton.jit
def is_listed(column, own, N, DIAGONAL: tl.constexpr):
    """True for columns that are items of a row's list: all, or all but the own pair."""
    listed = column < N
    if not DIAGONAL:
        listed = listed & (column != own)
    return listed


@triton.jit
def reference_at(y, equal, column, inside):
    """The reference of the columns, each read at the first equal item."""
    column = tl.load(equal + column, mask=inside, other=0)
    return tl.load(y + column, mask=inside, other=0.0)


@triton.jit
def survey(
    x, y, equal, own, N, s, BLOCK: tl.constexpr, DIAGONAL: tl.constexpr
):  # fmt: skip
    """A row's largest cosine, the range of its list's reference, and 1 if everything is finite, else 0.

    The range is of the items below the best (a best item far above the others would leave them one division),
    or of all where all are tied.

    Args:
        x: the row's cosines.
        y: the reference that ranks its list.
        equal: the index at which each item's reference is read.
        own: the column of the anchor's own pair.
        N: items of the row.
        s: the scale.
        BLOCK: columns that are read at a time.
        DIAGONAL: the own pair belongs to the list.
    """
    j = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -LARGEST, tl.float32)
    low = tl.full([BLOCK], LARGEST, tl.float32)
    best = tl.full([BLOCK], -LARGEST, tl.float32)
    high = tl.full([BLOCK], -LARGEST, tl.float32)
    finite = tl.full([BLOCK], 1, tl.int32)
    for c in range(0, N, BLOCK):
        inside = c + j < N
        listed = is_listed(c + j, own, N, DIAGONAL)
        cosine = tl.load(x + c + j, mask=inside, other=0.0)
        value = reference_at(y, equal, c + j, inside)
        # A comparison with NaN is false.
        small = (tl.abs(cosine) < LARGEST) & (tl.abs(cosine * s) < LARGEST) & (tl.abs(value) < LARGEST)
        finite = tl.where(small, finite, 0)
        top = tl.maximum(top, tl.where(inside, cosine, -LARGEST))
        low = tl.minimum(low, tl.where(listed, value, LARGEST))
        value = tl.where(listed, value, -LARGEST)
        # The best so far is below the best only where it is not the best any more.
        high = tl.maximum(high, tl.where(value == best, -LARGEST, tl.minimum(value, best)))
        best = tl.maximum(best, value)
    highest = tl.max(best, 0)
    second = tl.max(tl.where(best < highest, best, high), 0)
    lowest = tl.min(low, 0)
    return tl.max(top, 0), lowest, tl.where(highest > lowest, second, highest), tl.min(finite, 0)


@triton.jit
def division_of(value, low, high, divisions):
    """The division of [low, high] that holds a value; one more, the last, is above the range.

    It never decreases with the value, and is that of :func:`rankloss.ranking.quantize`.
    """
    width = tl.maximum(tl.div_rn(high - low, (divisions - 1).to(tl.float32)), SMALLEST_NORMAL)
    # Clamped before the division, which would overflow for a best item far above a narrow range.
    part = tl.div_rn(tl.maximum(tl.minimum(value, high) - low, 0.0), width)
    part = tl.minimum(part, (divisions - 2).to(tl.float32))
    return tl.where(value > high, divisions - 1, part.to(tl.int32))


@triton.jit
def weight_of_rank(rank, top_k):
    """1 for an item whose rank counts, else 0; the best has rank 1."""
    return tl.where(rank <= top_k, 1.0, 0.0)


@triton.jit
def with_own_pair(log_sum, own_score, DIAGONAL: tl.constexpr):
    """Log Σ e^x of all items, given that of the list, which has all items or all but the own pair."""
    if not DIAGONAL:
        m, w = joined(log_sum, 1.0, own_score, 1.0)
        log_sum = log_of(m, w)
    return log_sum


@triton.jit
def fill_with_nan(
    GRADIENT, CE, NLL, row, N, BLOCK: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_GRADIENT: tl.constexpr
):
    """Write NaN into both values and the gradient of a row."""
    tl.store(NLL + row, float("nan"))
    if HAS_ALPHA:
        tl.store(CE + row, float("nan"))
    if HAS_GRADIENT:
        out = GRADIENT + row.to(tl.int64) * N
        j = tl.arange(0, BLOCK)
        for c in range(0, N, BLOCK):
            tl.store(out + c + j, tl.full([BLOCK], float("nan"), tl.float32), mask=c + j < N)
