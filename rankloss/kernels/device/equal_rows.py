"""The kernels that find equal rows of features: one reads all of them, the other those that may be equal."""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_ZERO = tl.constexpr(-(2**31))
FIRST_FACTOR = tl.constexpr(1.3247179572447460)  # that of rankloss.equal_rows.row_hashes


@triton.jit
def hash_rows(WORDS, HASHES, n, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The hashes of :func:`rankloss.equal_rows.row_hashes`: sums of integers, the same in any order."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    rows = WORDS + i.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS], tl.int64)
    for c in range(0, width, COLUMNS):
        inside = (i < n)[:, None] & (c + j < width)[None, :]
        words = tl.load(rows + (c + j)[None, :], mask=inside, other=0)
        words = tl.where(words == NEGATIVE_ZERO, 0, words)
        factors = tl.sqrt((c + j).to(tl.float64) + tl.full([COLUMNS], FIRST_FACTOR, tl.float64))
        products = words.to(tl.float64) * factors[None, :]
        total += tl.sum(products.to(tl.int64, bitcast=True), 1)
    tl.store(HASHES + i, total, mask=i < n)


@triton.jit
def confirm_equals(X, CANDIDATES, FIRST, n, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row's candidate where the two are equal, else its own index; a row that holds NaN equals none."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    candidate = tl.load(CANDIDATES + i, mask=i < n, other=0)
    same = (i < n) & (candidate != i)
    if tl.max(same.to(tl.int32), 0) > 0:
        for c in range(0, width, COLUMNS):
            inside = same[:, None] & (c + j < width)[None, :]
            mine = tl.load(X + i.to(tl.int64)[:, None] * width + (c + j)[None, :], mask=inside, other=0.0)
            its = tl.load(X + candidate[:, None] * width + (c + j)[None, :], mask=inside, other=0.0)
            same = same & (tl.max((mine != its).to(tl.int32), 1) == 0)
    tl.store(FIRST + i, tl.where(same, candidate, i.to(tl.int64)), mask=i < n)
