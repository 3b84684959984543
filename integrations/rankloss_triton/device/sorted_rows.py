r"""The kernel for the exact order of a reference: ranks without a sort, one program per row at a time.

A row's items are put into as many buckets of equal width as there are items. An item's place is the start of
its bucket plus the number of bucket mates below it, which are found by comparing; of items that are tied, the
one with the smaller column comes first. The places depend on the values only and not on the order in which
the atomic operations filled a bucket, so that two runs agree in every bit.

Comparing is quadratic in the depth of a bucket, about three items as a rule. In a row with a bucket deeper
than ``DEEPEST`` (many ties, or an outlier that stretches the range) the buckets are sorted by merging, at a
cost per item of log² of the depth.

With p the place of an item and its tied items at first_p … last_p, the running sums are (x relative to the
row's largest, pairs as in :mod:`rankloss_triton.device.pieces`)

    log C_p = log Σ_{q ≤ last_p} e^{x_q},   log U_p = log Σ_{q ≥ first_p} μ_q / C_q.

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


@triton.jit
def fill_buckets(
    y, equal, own, N, low, high, keys, items, slot, start, buckets,
    BLOCK: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Write a list's references and columns bucket by bucket, and return the depth of the deepest bucket.

    Bucket q holds places ``start[q]`` to ``start[q + 1]``.
    """
    j = tl.arange(0, BLOCK)
    for c in range(0, buckets + 1, BLOCK):
        tl.store(start + c + j, tl.zeros([BLOCK], tl.int32), mask=c + j <= buckets)
    tl.debug_barrier()
    # Count each bucket's items; an item's slot in its bucket is the count before it.
    for c in range(0, N, BLOCK):
        listed = is_listed(c + j, own, N, DIAGONAL)
        q = division_of(reference_at(y, equal, c + j, listed), low, high, buckets)
        place = tl.atomic_add(start + q, 1, mask=listed, sem="relaxed")
        tl.store(slot + c + j, place, mask=listed)
    tl.debug_barrier()
    # Replace the counts by the first places.
    filled = tl.full([], 0, tl.int32)
    deepest = tl.full([], 0, tl.int32)
    for c in range(0, buckets + 1, BLOCK):
        depth = tl.load(start + c + j, mask=c + j <= buckets, other=0)
        tl.store(start + c + j, filled + tl.cumsum(depth, 0) - depth, mask=c + j <= buckets)
        filled += tl.sum(depth, 0)
        deepest = tl.maximum(deepest, tl.max(depth, 0))
    tl.debug_barrier()
    for c in range(0, N, BLOCK):
        listed = is_listed(c + j, own, N, DIAGONAL)
        value = reference_at(y, equal, c + j, listed)
        q = division_of(value, low, high, buckets)
        place = tl.load(start + q, mask=listed, other=0) + tl.load(slot + c + j, mask=listed, other=0)
        tl.store(keys + place, value, mask=listed)
        tl.store(items + place, c + j, mask=listed)
    tl.debug_barrier()
    return deepest


@triton.jit
def rank_by_comparing(
    x, top, s, low, high, keys, items, first, last, ranked, start, buckets, M, BLOCK: tl.constexpr
):
    """Write at each item's place its score, and the last place of its ties; by column their first place."""
    j = tl.arange(0, BLOCK)
    for c in range(0, M, BLOCK):
        inside = c + j < M
        key = tl.load(keys + c + j, mask=inside, other=0.0)
        item = tl.load(items + c + j, mask=inside, other=0)
        q = division_of(key, low, high, buckets)
        begin = tl.load(start + q, mask=inside, other=0)
        depth = tl.load(start + q + 1, mask=inside, other=0) - begin
        deepest = tl.max(depth, 0)
        below = tl.zeros([BLOCK], tl.int32)  # bucket mates of lower references
        tied = tl.zeros([BLOCK], tl.int32)  # of equal ones, the item itself included
        before = tl.zeros([BLOCK], tl.int32)  # of those, the ones in smaller columns
        for r in range(0, deepest):
            mate = r < depth
            value = tl.load(keys + begin + r, mask=mate, other=0.0)
            below += (mate & (value < key)).to(tl.int32)
            tied += (mate & (value == key)).to(tl.int32)
        if tl.max(tied, 0) > 1:
            for r in range(0, deepest):
                mate = r < depth
                value = tl.load(keys + begin + r, mask=mate, other=0.0)
                column = tl.load(items + begin + r, mask=mate, other=0)
                before += (mate & (value == key) & (column < item)).to(tl.int32)
        place = begin + below + before
        score = (tl.load(x + item, mask=inside, other=0.0) - top) * s
        tl.store(ranked + place, score, mask=inside)
        tl.store(last + place, begin + below + tied - 1, mask=inside)
        tl.store(first + item, begin + below, mask=inside)


@triton.jit
def merge_runs(
    low, high, keys, items, merged_keys, merged_items, start, buckets, M, width, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge neighbouring sorted runs of a width in every bucket.

    An item's place is found by bisection in the other run. ``steps`` of it end: 1 + log₂ of the width.
    """
    j = tl.arange(0, BLOCK)
    for c in range(0, M, BLOCK):
        inside = c + j < M
        key = tl.load(keys + c + j, mask=inside, other=0.0)
        item = tl.load(items + c + j, mask=inside, other=0)
        q = division_of(key, low, high, buckets)
        begin = tl.load(start + q, mask=inside, other=0)
        end = tl.load(start + q + 1, mask=inside, other=0)
        run = (c + j - begin) // width
        mine = begin + run * width
        sibling = begin + (run ^ 1) * width  # runs 0 and 1 are merged, 2 and 3, …
        # The number of the sibling's items before this one is between least and most.
        least = tl.zeros([BLOCK], tl.int32)
        most = tl.minimum(tl.maximum(end - sibling, 0), width)
        for _ in range(0, steps):
            open_ = inside & (least < most)
            middle = (least + most) // 2
            value = tl.load(keys + sibling + middle, mask=open_, other=0.0)
            column = tl.load(items + sibling + middle, mask=open_, other=0)
            before = (value < key) | ((value == key) & (column < item))
            least = tl.where(open_ & before, middle + 1, least)
            most = tl.where(open_ & ~before, middle, most)
        place = tl.minimum(mine, sibling) + (c + j - mine) + least  # both runs' begin, those before in each
        tl.store(merged_keys + place, key, mask=inside)
        tl.store(merged_items + place, item, mask=inside)
    tl.debug_barrier()


@triton.jit
def bisect(keys, key, least, most, inside, steps, ABOVE: tl.constexpr):
    """The first place in [least, most) whose key is > key, or ≥ key without ABOVE; most if there is none.

    ``steps`` is at least 1 + ⌊log₂(most − least)⌋.
    """
    for _ in range(0, steps):
        open_ = inside & (least < most)
        middle = (least + most) // 2
        value = tl.load(keys + middle, mask=open_, other=0.0)
        after = value > key if ABOVE else value >= key
        least = tl.where(open_ & ~after, middle + 1, least)
        most = tl.where(open_ & after, middle, most)
    return least


@triton.jit
def rank_by_merging(
    x, top, s, low, high, keys, items, first, last, ranked, start, buckets, N, M, deepest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The same as :func:`rank_by_comparing`, with a bound on its cost."""
    j = tl.arange(0, BLOCK)
    width = tl.full([], 1, tl.int32)
    steps = tl.full([], 1, tl.int32)
    # The runs go to and fro between keys and ranked, items and last, which are N entries apart. The last pass
    # may have nothing to merge; it copies.
    side = tl.full([], 0, tl.int32)
    while (width < deepest) | (side != 0):
        there = N - side
        merge_runs(
            low, high, keys + side, items + side, keys + there, items + there, start, buckets, M,
            width, steps, BLOCK,
        )  # fmt: skip
        side = there
        width *= 2
        steps += 1
    for c in range(0, M, BLOCK):
        inside = c + j < M
        key = tl.load(keys + c + j, mask=inside, other=0.0)
        item = tl.load(items + c + j, mask=inside, other=0)
        q = division_of(key, low, high, buckets)
        begin = tl.load(start + q, mask=inside, other=0)
        end = tl.load(start + q + 1, mask=inside, other=0)
        first_tied = bisect(keys, key, begin, c + j, inside, steps, ABOVE=False)
        tl.store(first + item, first_tied, mask=inside)
        end_of_ties = bisect(keys, key, c + j + 1, end, inside, steps, ABOVE=True)
        tl.store(last + c + j, end_of_ties - 1, mask=inside)
        score = (tl.load(x + item, mask=inside, other=0.0) - top) * s
        tl.store(ranked + c + j, score, mask=inside)


@triton.jit
def sum_upwards(ranked, log_c, M, BLOCK: tl.constexpr):
    """Write log Σ_{q ≤ p} e^{x_q} of every place p, and return the last of them.

    At the last place of a tie it is log C of all the items there.
    """
    j = tl.arange(0, BLOCK)
    m0 = tl.full([], NONE, tl.float32)  # m0 and w0 are the sum of all blocks before
    w0 = tl.full([], 0.0, tl.float32)
    for c in range(0, M, BLOCK):
        inside = c + j < M
        score = tl.load(ranked + c + j, mask=inside, other=NONE)
        m, w = tl.associative_scan((score, inside.to(tl.float32)), 0, joined)
        m, w = joined(m0, w0, m, w)
        tl.store(log_c + c + j, log_of(m, w), mask=inside)
        m0, w0 = at(j, m, BLOCK - 1), at(j, w, BLOCK - 1)
    return log_of(m0, w0)


@triton.jit
def sum_downwards(ranked, last, log_c, M, top_k, BLOCK: tl.constexpr, WEIGHS: tl.constexpr):
    """Replace the score of every place p by log Σ_{q ≥ p} μ_q / C_q, and return the NLL and Σ μ."""
    j = tl.arange(0, BLOCK)
    terms = tl.zeros([BLOCK], tl.float32)
    total_mu = M.to(tl.float32)
    if WEIGHS:
        total_mu = tl.full([], 0.0, tl.float32)
    m0 = tl.full([], NONE, tl.float32)
    w0 = tl.full([], 0.0, tl.float32)
    blocks = tl.cdiv(M, BLOCK)
    for b in range(0, blocks):
        c = (blocks - 1 - b) * BLOCK
        inside = c + j < M
        last_tied = tl.load(last + c + j, mask=inside, other=0)
        denominator = tl.load(log_c + last_tied, mask=inside, other=0.0)
        score = tl.load(ranked + c + j, mask=inside, other=0.0)
        mu = inside.to(tl.float32)
        if WEIGHS:
            mu *= weight_of_rank(M - last_tied, top_k)
            total_mu += tl.sum(mu, 0)
        terms += mu * (denominator - score)
        m, w = tl.associative_scan((tl.where(mu > 0, -denominator, NONE), mu), 0, joined, reverse=True)
        m, w = joined(m, w, m0, w0)
        tl.store(ranked + c + j, log_of(m, w), mask=inside)
        m0, w0 = at(j, m, 0), at(j, w, 0)
    return tl.sum(terms, 0), total_mu


@triton.jit
def write_gradient(
    out, x, own, N, s, top, first, last, ranked, log_sum, alpha, beta, M, top_k,
    BLOCK: tl.constexpr, HAS_ALPHA: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """Write β·(e^x·U − μ) + α·(e^x / Σ e^x − [own pair]) of every item; ``ranked`` has log U by place."""
    j = tl.arange(0, BLOCK)
    for c in range(0, N, BLOCK):
        inside = c + j < N
        listed = is_listed(c + j, own, N, DIAGONAL)
        score = (tl.load(x + c + j, mask=inside, other=0.0) - top) * s
        first_tied = tl.load(first + c + j, mask=listed, other=0)
        mu = listed.to(tl.float32)
        if WEIGHS:
            last_tied = tl.load(last + first_tied, mask=listed, other=0)
            mu *= weight_of_rank(M - last_tied, top_k)
        log_u = tl.load(ranked + first_tied, mask=listed, other=NONE)
        slope = beta * (tl.exp(score + log_u) - mu)
        if HAS_ALPHA:
            slope += alpha * (tl.exp(score - log_sum) - (c + j == own).to(tl.float32))
        tl.store(out + c + j, slope, mask=inside)


@triton.jit(do_not_specialize=["n", "first_row", "anchors", "top_k"])
def sorted_rows(
    X, Y, EQUAL, GRADIENT, CE, NLL, FLOATS, INTS, scale, ALPHA, BETA,
    n, N, first_row, anchors, top_k, buckets,
    BLOCK: tl.constexpr, DEEPEST: tl.constexpr, OPPOSITE: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_GRADIENT: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHS: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """CE, NLL and gradient of every row; see :func:`rankloss_triton.evaluate`.

    A program has scratch of its own for one row: ``FLOATS`` holds 2·N, ``INTS`` 3·N + buckets + 1.
    """
    program = tl.program_id(0)
    keys = FLOATS + program.to(tl.int64) * 2 * N
    ranked = keys + N
    items = INTS + program.to(tl.int64) * (3 * N + buckets + 1)
    last, first, start = items + N, items + 2 * N, items + 3 * N
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
                deepest = fill_buckets(  # ``first`` has the slots in the buckets until the ranks are known
                    y, equal, own, N, low, high, keys, items, first, start, buckets,
                    BLOCK, DIAGONAL,
                )  # fmt: skip
                if deepest <= DEEPEST:
                    rank_by_comparing(
                        x, top, s, low, high, keys, items, first, last, ranked, start, buckets, M, BLOCK
                    )
                else:
                    rank_by_merging(
                        x, top, s, low, high, keys, items, first, last, ranked, start, buckets, N, M,
                        deepest, BLOCK,
                    )  # fmt: skip
                tl.debug_barrier()
                log_sum = sum_upwards(ranked, keys, M, BLOCK)  # the keys have served
                tl.debug_barrier()
                nll, total_mu = sum_downwards(ranked, last, keys, M, top_k, BLOCK, WEIGHS)
                beta = tl.load(BETA + row // anchors).to(tl.float32)
                if MEAN:
                    nll /= total_mu
                    beta /= total_mu
                tl.store(NLL + row, nll)
                tl.debug_barrier()
                alpha = tl.full([], 0.0, tl.float32)
                if HAS_ALPHA:
                    alpha = tl.load(ALPHA + row // anchors).to(tl.float32)
                    own_score = (tl.load(x + own) - top) * s
                    log_sum = with_own_pair(log_sum, own_score, DIAGONAL)
                    tl.store(CE + row, log_sum - own_score)
                if HAS_GRADIENT:
                    write_gradient(
                        GRADIENT + row.to(tl.int64) * N, x, own, N, s, top, first, last, ranked, log_sum,
                        alpha, beta, M, top_k, BLOCK, HAS_ALPHA, DIAGONAL, WEIGHS,
                    )  # fmt: skip
            else:
                fill_with_nan(GRADIENT, CE, NLL, row, N, BLOCK, HAS_ALPHA, HAS_GRADIENT)
            tl.debug_barrier()  # the next row uses the same scratch
            row = next_row(row, ranked_by, n, anchors, OPPOSITE)
            rows_left -= anchors
        anchor += tl.num_programs(0)
