"""Device functions that both kernels are made of.

Running sums are kept as pairs (m, w) that stand for w·eᵐ with m the largest exponent so far. Joining two
pairs takes the larger m, so a sum neither overflows nor loses its largest terms however far apart the
exponents are, which a plain float32 sum does beyond 88 nats.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-3.0e38)  # the m of an empty sum: finite, since −inf − (−inf) would be NaN
LARGEST = tl.constexpr(1.0e38)  # a row that holds more is NaN: differences of its entries could overflow


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
def at(index, x, place):
    """The entry of a block at one place."""
    return tl.sum(tl.where(index == place, x, tl.zeros_like(x)), 0)


@triton.jit
def reference_at(y, equal, column, inside, HAS_EQUAL: tl.constexpr):
    """The reference of the columns, read at the first equal item where there is an index of those."""
    if HAS_EQUAL:
        column = tl.load(equal + column, mask=inside, other=0)
    return tl.load(y + column, mask=inside, other=0.0)


@triton.jit
def survey(x, y, equal, own, N, s, BLOCK: tl.constexpr, HAS_EQUAL: tl.constexpr):
    """Largest cosine of a row, range of the reference without the own pair, whether everything is finite."""
    j = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -LARGEST, tl.float32)
    low = tl.full([BLOCK], LARGEST, tl.float32)
    high = tl.full([BLOCK], -LARGEST, tl.float32)
    finite = tl.full([BLOCK], 1, tl.int32)
    for c in range(0, N, BLOCK):
        inside = c + j < N
        other = inside & (c + j != own)
        cosine = tl.load(x + c + j, mask=inside, other=0.0)
        value = reference_at(y, equal, c + j, inside, HAS_EQUAL)
        # A comparison with NaN is false.
        small = (tl.abs(cosine) < LARGEST) & (tl.abs(cosine * s) < LARGEST) & (tl.abs(value) < LARGEST)
        finite = tl.where(small, finite, 0)
        top = tl.maximum(top, tl.where(inside, cosine, -LARGEST))
        low = tl.minimum(low, tl.where(other, value, LARGEST))
        high = tl.maximum(high, tl.where(other, value, -LARGEST))
    return tl.max(top, 0), tl.min(low, 0), tl.max(high, 0), tl.min(finite, 0)


@triton.jit
def division_of(value, low, high, divisions):
    """The division of [low, high] that holds a value; one more, the last, is above the range.

    It never decreases with the value. The own pair, which is no part of the range, falls into the last
    division where it is above all others, and else where its value belongs.
    """
    extent = tl.maximum(high - low, 1.1754944e-38)
    # Clamped before the division, which would overflow for an own pair far outside a narrow range.
    part = tl.div_rn(tl.minimum(tl.maximum(value - low, 0.0), extent), extent) * (divisions - 1)
    part = tl.minimum(part, (divisions - 2).to(tl.float32))
    return tl.where(value > high, divisions - 1, part.to(tl.int32))


@triton.jit
def weight_of_rank(rank, top_k, DISCOUNT: tl.constexpr):
    """μ of an item of this rank; 1 is the best."""
    weight = tl.full(rank.shape, 1.0, tl.float32)
    if DISCOUNT:
        weight = 1.0 / tl.log(1.0 + rank.to(tl.float32))
    return tl.where(rank <= top_k, weight, 0.0)


@triton.jit
def fill_with_nan(out, N, BLOCK: tl.constexpr):
    """NaN in the N entries of a row."""
    j = tl.arange(0, BLOCK)
    for c in range(0, N, BLOCK):
        tl.store(out + c + j, tl.full([BLOCK], float("nan"), tl.float32), mask=c + j < N)
