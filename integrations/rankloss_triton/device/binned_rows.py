r"""The kernel for a reference that is divided into bins, one program per row at a time.

Each bin has its largest score, its number of items and the sum of its worths relative to that score. All
three are integers while they are collected (the score by a map that keeps the order of floats, the sum in
units of 2⁻⁴⁴), so that atomic operations give the same bits in every order. The running sums over bins are

    log C_b = log Σ_{c ≤ b} W_c,   log U_b = log Σ_{c ≥ b} n_c·μ_c / C_c.

Names in all functions: x and y are a row's cosines and the reference that ranks its list, equal the index at
which each item's reference is read, own the column of the anchor's own pair; s is the scale, and top, low and
high come from :func:`~rankloss_triton.device.pieces.survey`. A list has M of the row's N items. Columns are
read BLOCK at a time, from c on: c + j.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankloss_triton.device.pieces import (
    NONE,
    at,
    division_of,
    fill_with_nan,
    is_listed,
    joined,
    log_of,
    next_row,
    reference_at,
    reference_row,
    survey,
    weight_of_rank,
    with_own_pair,
)

UNIT = tl.constexpr(2.0**-44)  # of a bin's sum: 2¹⁷ worths of at most 1 stay below 2⁶²
PER_ONE = tl.constexpr(2.0**44)
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def ordered_bits(bits):
    """Integers in the order of the floats that have these bits, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def collect_bins(
    x, y, equal, own, N, s, top, low, high, largest, count, total, bins,
    BLOCK: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Write the largest score, the number of items and the sum of worths of every bin."""
    j = tl.arange(0, BLOCK)
    for c in range(0, bins, BLOCK):
        inside = c + j < bins
        tl.store(largest + c + j, tl.full([BLOCK], LOWEST, tl.int32), mask=inside)
        tl.store(count + c + j, tl.zeros([BLOCK], tl.int32), mask=inside)
        tl.store(total + c + j, tl.zeros([BLOCK], tl.int64), mask=inside)
    tl.debug_barrier()
    # First the largest scores and the numbers of items, then the sums relative to the largest.
    for c in range(0, N, BLOCK):
        listed = is_listed(c + j, own, N, DIAGONAL)
        q = division_of(reference_at(y, equal, c + j, listed), low, high, bins)
        score = (tl.load(x + c + j, mask=listed, other=0.0) - top) * s
        key = ordered_bits(score.to(tl.int32, bitcast=True))
        tl.atomic_max(largest + q, key, mask=listed, sem="relaxed")
        tl.atomic_add(count + q, 1, mask=listed, sem="relaxed")
    tl.debug_barrier()
    for c in range(0, N, BLOCK):
        listed = is_listed(c + j, own, N, DIAGONAL)
        q = division_of(reference_at(y, equal, c + j, listed), low, high, bins)
        score = (tl.load(x + c + j, mask=listed, other=0.0) - top) * s
        key = tl.load(largest + q, mask=listed, other=0)
        # Above 0 only past the row's end, where no integer would hold the worth.
        worth = tl.exp(tl.minimum(score - ordered_bits(key).to(tl.float32, bitcast=True), 0.0))
        tl.atomic_add(total + q, (worth * PER_ONE).to(tl.int64), mask=listed, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def sum_bins_upwards(largest, count, total, log_c, weight, M, top_k, bins,
                     BLOCK: tl.constexpr, WEIGHS: tl.constexpr):  # fmt: skip
    """Write log C and μ of every bin, and return the last log C, Σ n·μ·log C and Σ n·μ."""
    j = tl.arange(0, BLOCK)
    terms = tl.zeros([BLOCK], tl.float32)
    total_mu = M.to(tl.float32)
    if WEIGHS:
        total_mu = tl.full([], 0.0, tl.float32)
    below = tl.full([], 0, tl.int32)  # items in all blocks before; m0 and w0 are the sum of their worths
    m0 = tl.full([], NONE, tl.float32)
    w0 = tl.full([], 0.0, tl.float32)
    for c in range(0, bins, BLOCK):
        inside = c + j < bins
        members = tl.load(count + c + j, mask=inside, other=0)
        key = tl.load(largest + c + j, mask=inside, other=0)
        worth = tl.load(total + c + j, mask=inside, other=0).to(tl.float32) * UNIT
        exponent = tl.where(members > 0, ordered_bits(key).to(tl.float32, bitcast=True), NONE)
        m, w = tl.associative_scan((exponent, worth), 0, joined)
        m, w = joined(m0, w0, m, w)
        log_sum = log_of(m, w)
        if WEIGHS:
            rank = M - (below + tl.cumsum(members, 0)) + 1  # the best of the bin's, which all of them share
            mu = weight_of_rank(rank, top_k)
            below += tl.sum(members, 0)
            tl.store(weight + c + j, mu, mask=inside)
            total_mu += tl.sum(members.to(tl.float32) * mu, 0)
            terms += tl.where(members > 0, members.to(tl.float32) * mu * log_sum, 0.0)
        else:
            terms += members.to(tl.float32) * log_sum
        tl.store(log_c + c + j, log_sum, mask=inside)
        m0, w0 = at(j, m, BLOCK - 1), at(j, w, BLOCK - 1)
    return log_of(m0, w0), tl.sum(terms, 0), total_mu


@triton.jit
def sum_bins_downwards(count, log_c, weight, bins, BLOCK: tl.constexpr, WEIGHS: tl.constexpr):
    """Replace log C by log U in every bin."""
    j = tl.arange(0, BLOCK)
    m0 = tl.full([], NONE, tl.float32)
    w0 = tl.full([], 0.0, tl.float32)
    blocks = tl.cdiv(bins, BLOCK)
    for b in range(0, blocks):
        c = (blocks - 1 - b) * BLOCK
        inside = c + j < bins
        members = tl.load(count + c + j, mask=inside, other=0).to(tl.float32)
        if WEIGHS:
            members *= tl.load(weight + c + j, mask=inside & (members > 0), other=0.0)
        log_sum = tl.load(log_c + c + j, mask=inside, other=0.0)
        m, w = tl.associative_scan((tl.where(members > 0, -log_sum, NONE), members), 0, joined, reverse=True)
        m, w = joined(m, w, m0, w0)
        tl.store(log_c + c + j, log_of(m, w), mask=inside)
        m0, w0 = at(j, m, 0), at(j, w, 0)


@triton.jit
def sum_scores_and_write_gradient(
    out, x, y, equal, own, N, s, top, low, high, log_u, weight, log_sum, alpha, beta, bins,
    BLOCK: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_GRADIENT: tl.constexpr, DIAGONAL: tl.constexpr,
    WEIGHS: tl.constexpr,
):  # fmt: skip
    """Return Σ μ·x of the list; write β·(e^x·U − μ) + α·(e^x / Σ e^x − [own pair]) with HAS_GRADIENT."""
    j = tl.arange(0, BLOCK)
    scores = tl.zeros([BLOCK], tl.float32)
    for c in range(0, N, BLOCK):
        inside = c + j < N
        listed = is_listed(c + j, own, N, DIAGONAL)
        score = (tl.load(x + c + j, mask=inside, other=0.0) - top) * s
        q = division_of(reference_at(y, equal, c + j, listed), low, high, bins)
        mu = listed.to(tl.float32)
        if WEIGHS:
            mu *= tl.load(weight + q, mask=listed, other=0.0)
        scores += tl.where(listed, mu * score, 0.0)
        if HAS_GRADIENT:
            share = tl.exp(score + tl.load(log_u + q, mask=listed, other=NONE))
            slope = beta * (share - mu)
            if HAS_ALPHA:
                slope += alpha * (tl.exp(score - log_sum) - (c + j == own).to(tl.float32))
            tl.store(out + c + j, slope, mask=inside)
    return tl.sum(scores, 0)


@triton.jit(do_not_specialize=["n", "first_row", "anchors", "top_k"])
def binned_rows(
    X, Y, EQUAL, GRADIENT, CE, NLL, FLOATS, INTS, TOTALS, scale, ALPHA, BETA,
    n, N, first_row, anchors, top_k, bins,
    BLOCK: tl.constexpr, OPPOSITE: tl.constexpr, HAS_ALPHA: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHS: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """CE, NLL and gradient of every row; see :func:`rankloss_triton.evaluate`.

    A program has scratch of its own for one row: ``FLOATS`` holds 2·bins, ``INTS`` 2·bins, ``TOTALS`` bins.
    """
    program = tl.program_id(0).to(tl.int64)
    log_u = FLOATS + program * 2 * bins
    weight = log_u + bins
    largest = INTS + program * 2 * bins
    count = largest + bins
    total = TOTALS + program * bins
    s = tl.load(scale).to(tl.float32)
    M = N if DIAGONAL else N - 1
    anchor = tl.program_id(0)
    while anchor < anchors:  # not a range, whose variable is a plain int in the interpreter
        own = first_row + anchor
        row, rows_left = anchor, n
        while rows_left > 0:
            ranked_by = reference_row(row, anchor, n, anchors, OPPOSITE)
            x = X + row.to(tl.int64) * N
            y = Y + ranked_by.to(tl.int64) * N
            equal = EQUAL + tl.where(row < n // 2, 0, N)
            top, low, high, finite = survey(x, y, equal, own, N, s, BLOCK, DIAGONAL)
            if finite != 0:
                collect_bins(
                    x, y, equal, own, N, s, top, low, high, largest, count, total, bins,
                    BLOCK, DIAGONAL,
                )  # fmt: skip
                log_sum, denominators, total_mu = sum_bins_upwards(
                    largest, count, total, log_u, weight, M, top_k, bins, BLOCK, WEIGHS
                )
                tl.debug_barrier()
                sum_bins_downwards(count, log_u, weight, bins, BLOCK, WEIGHS)
                tl.debug_barrier()
                alpha = tl.full([], 0.0, tl.float32)
                if HAS_ALPHA:
                    alpha = tl.load(ALPHA + row // anchors).to(tl.float32)
                    own_score = (tl.load(x + own) - top) * s
                    log_sum = with_own_pair(log_sum, own_score, DIAGONAL)
                    tl.store(CE + row, log_sum - own_score)
                beta = tl.load(BETA + row // anchors).to(tl.float32)
                if MEAN:
                    beta /= total_mu
                scores = sum_scores_and_write_gradient(
                    GRADIENT + row.to(tl.int64) * N, x, y, equal, own, N, s, top, low, high, log_u, weight,
                    log_sum, alpha, beta, bins, BLOCK, HAS_ALPHA, HAS_GRADIENT, DIAGONAL, WEIGHS,
                )  # fmt: skip
                nll = denominators - scores
                if MEAN:
                    nll /= total_mu
                tl.store(NLL + row, nll)
            else:
                fill_with_nan(GRADIENT, CE, NLL, row, N, BLOCK, HAS_ALPHA, HAS_GRADIENT)
            tl.debug_barrier()  # the next row uses the same scratch
            row = next_row(row, ranked_by, n, anchors, OPPOSITE)
            rows_left -= anchors
        anchor += tl.num_programs(0)
