"""Kernels for equal rows of features: one hashes all rows, the other compares those of equal hashes."""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_ZERO = tl.constexpr(-(2**31))
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)  # the golden ratio in 64 bits: its multiples are far apart
MIXING_SHIFT = tl.constexpr(31)  # no bit then has fewer than 32 above it, itself or its copy


@triton.jit
def hash_rows(WORDS, HASHES, n, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A hash of every row: its bits as 64-bit words, mixed, each times an odd number of its column, summed.

    Sums of integers are the same in any order, and no step is arithmetic on the floats themselves, where a
    flushed subnormal would depend on the thread.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    rows = WORDS + i.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS], tl.int64)
    for c in range(0, (width + 1) // 2, COLUMNS):  # of words, which have two columns each
        lower = 2 * (c + j)[None, :]
        inside = (i < n)[:, None] & (lower < width)
        low = tl.load(rows + lower, mask=inside, other=0)
        high = tl.load(rows + lower + 1, mask=inside & (lower + 1 < width), other=0)
        low = tl.where(low == NEGATIVE_ZERO, 0, low)
        high = tl.where(high == NEGATIVE_ZERO, 0, high)
        words = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        factors = ((c + j).to(tl.int64) * tl.full([COLUMNS], GOLDEN, tl.int64)) | 1
        total += tl.sum((words ^ (words >> MIXING_SHIFT)) * factors[None, :], 1)
    tl.store(HASHES + i, total, mask=i < n)


@triton.jit
def confirm_equals(X, CANDIDATES, FIRST, n, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row's candidate where the two are equal, else its own index; a row that holds NaN equals none."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    candidate = tl.load(CANDIDATES + i, mask=i < n, other=0)
    own_row = X + i.to(tl.int64)[:, None] * width
    candidate_row = X + candidate[:, None] * width
    same = (i < n) & (candidate != i)
    if tl.max(same.to(tl.int32), 0) > 0:  # a program whose rows are their own candidates reads none
        for c in range(0, width, COLUMNS):
            column = (c + j)[None, :]
            inside = same[:, None] & (column < width)
            own = tl.load(own_row + column, mask=inside, other=0.0)
            of_candidate = tl.load(candidate_row + column, mask=inside, other=0.0)
            differences = (own != of_candidate).to(tl.int32)
            same = same & (tl.max(differences, 1) == 0)
    tl.store(FIRST + i, tl.where(same, candidate, i.to(tl.int64)), mask=i < n)
