from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batches import Batch, batches, gradients, random_batch, relative_error
from fake_cuda import fake_cuda
from rankloss import RankConsistency, plackett_luce_nll
from rankloss import ranking as ranking_module
from rankloss.options import RankOptions
from rankloss.ranking import (
    Selected,
    Sorted,
    _running_sum_in_blocks,
    _sort_rows,
    ascending,
    group_bounds,
    quantize,
    running_sum,
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)  # zeros of both signs and subnormals too


@given(rows=hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite))
def test_values_are_sorted_and_indices_say_where_they_came_from(rows) -> None:
    x = torch.from_numpy(rows)
    values, indices = ascending(x)
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, indices), values)
    assert torch.equal(indices.sort(dim=-1).values, torch.arange(x.shape[-1]).expand(x.shape))


@pytest.mark.parametrize("threads", [1, 3])
def test_large_blocks_are_sorted_by_as_many_threads_as_torch_has(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(128, 3001)
        values, indices = ascending(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, indices), values)


def test_float64_keeps_all_its_bits() -> None:
    x = torch.tensor([[1.0 + 2**-40, 1.0, 1.0 + 2**-41]], dtype=torch.float64)
    assert ascending(x)[1].tolist() == [[1, 2, 0]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_sorts_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    keys = np.random.default_rng(0).standard_normal((64, 4096))
    _sort_rows(keys.copy())  # the parent's pool exists now, and its threads do not survive a fork
    child = os.fork()
    if child == 0:
        _sort_rows(keys)
        os._exit(0 if (np.diff(keys) >= 0).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_flushed_subnormals_lose_no_index() -> None:
    x = torch.tensor([[0.0, 1.0, -0.0, 1e-42, -1.0, 0.0, -1e-42, 1e-38]])
    assert torch.set_flush_denormal(True)
    try:
        values, indices = ascending(x)
    finally:
        torch.set_flush_denormal(False)
    assert indices.sort(dim=-1).values.tolist() == [list(range(8))]
    assert indices[0, 0] == 4
    assert indices[0, -2:].tolist() == [7, 1]
    assert (values.diff() >= 0).all()


# --- running sums -----------------------------------------------------------------------------------------


@given(n=st.integers(1, 9000), seed=st.integers(0, 2**16))
def test_running_sums_in_blocks_are_running_sums(n: int, seed: int) -> None:
    x = (20 * torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).exp()
    torch.testing.assert_close(_running_sum_in_blocks(x), x.cumsum(-1), rtol=1e-12, atol=0)


def test_deterministic_algorithms_on_cuda_take_no_cumsum_of_floats() -> None:
    class Cumsums(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "cumsum" in str(func)
            return func(*args, **(kwargs or {}))

    with fake_cuda(), Cumsums() as cumsums:
        x = torch.empty(3, 1000, device="cuda")
        assert running_sum(x).shape == x.shape
        assert cumsums.count == 1
        torch.use_deterministic_algorithms(True)
        try:
            sums = running_sum(x)
        finally:
            torch.use_deterministic_algorithms(False)
        assert (sums.shape, sums.dtype, cumsums.count) == (x.shape, torch.float64, 1)


# --- ties -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_group_bounds_are_the_first_and_last_index_of_each_value(values: list[int]) -> None:
    values.sort()
    first, last = group_bounds(torch.tensor(values, dtype=torch.float32))
    assert first.tolist() == [values.index(v) for v in values]
    assert last.tolist() == [len(values) - 1 - values[::-1].index(v) for v in values]


# --- the best few -----------------------------------------------------------------------------------------


@given(
    values=st.lists(st.integers(0, 6), min_size=1, max_size=20),
    k=st.integers(1, 20),
    discount=st.sampled_from([None, "log"]),
    seed=st.integers(0, 2**16),
)
def test_selected_lists_are_the_sorted_ones(values: list[int], k: int, discount, seed: int) -> None:
    """Ties at the last place that counts included, however many items they have."""
    n = len(values)
    options = RankOptions(top_k=min(k, n), discount=discount)
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(values, dtype=torch.float64)[torch.stack([torch.randperm(n, generator=generator)] * 2)]
    y[1] = torch.rand(n, generator=generator, dtype=torch.float64)
    w = (40 * torch.rand(y.shape, generator=generator, dtype=torch.float64) - 20).exp()
    order = y.argsort(-1)
    found = []
    for ranking in (Sorted(order, y.gather(-1, order), options), Selected(y, options)):

        def in_order_of_list(by_slot: Tensor, ranking=ranking) -> Tensor:
            of_items = ranking.of_items(by_slot).expand(y.shape)
            if ranking.order is None:
                return of_items
            return torch.empty_like(y).scatter_(-1, ranking.order, of_items)

        arranged = w if ranking.order is None else w.gather(-1, ranking.order)
        denominators = ranking.denominators(arranged)
        nll = ranking.log_denominators(denominators, narrow=False)
        total = denominators[:, -1].clone()
        found.append(
            [
                ranking.total_mu.expand(2, 1),
                in_order_of_list(ranking.mu),
                nll,
                total,
                in_order_of_list(ranking.suffix(ranking.shares(denominators))),
            ]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_tail_far_below_the_best_items_is_not_lost_in_a_difference() -> None:
    y = torch.arange(32.0)[None]
    w = torch.where(y == 31, 1e30, 1e-30)
    selected = Selected(y, RankOptions(top_k=2))
    torch.testing.assert_close(
        selected.denominators(w), torch.tensor([[31e-30, 31e-30, 1e30]], dtype=torch.float64)
    )


@pytest.mark.parametrize("method", ["row", "others"])
@given(batch=batches(min_n=9, max_n=20), k=st.integers(1, 2), discount=st.sampled_from([None, "log"]))
def test_few_counted_items_are_selected_and_nothing_is_sorted(method: str, batch: Batch, k, discount) -> None:
    options = {"top_k": k, "discount": discount, "diagonal": method == "row"}
    inputs, results = batch.leaves(), []
    for few in (1, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking_module, "_FEW", few)
            if few == 1:
                patch.setattr(ranking_module, "ascending", None)  # which sorting would call
            value = RankConsistency(chunk_size=4, **options)(*inputs)
            results.append([value, *gradients(value, inputs, -0.8)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# --- bins -------------------------------------------------------------------------------------------------

lists = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12).map(torch.tensor)


@given(y=lists, bins=st.integers(2, 40))
def test_a_bin_never_decreases_with_the_reference_and_all_but_one_divide_the_range_of_the_rest(
    y: Tensor, bins: int
) -> None:
    b = quantize(y, bins)
    assert b.dtype == torch.int64
    order = y.argsort()
    assert (b[order].diff() >= 0).all()
    assert b.min() == 0
    if y.max() == y.min():
        assert (b == 0).all()
        return
    best = y == y.max()
    assert torch.equal(b == bins - 1, best)
    rest, b = y[~best], b[~best]
    if rest.max() - rest.min() > 1e-30:
        assert b.max() == bins - 2
        width = (rest.max() - rest.min()).double() / (bins - 1)
        inside = (rest - rest.min()).double() / width
        assert ((inside - b).abs() <= 1 + 1e-4).all()


@pytest.mark.parametrize("bins", [2, 3, 2**24])
def test_every_bin_is_in_range_whatever_the_reference_holds(bins: int) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-42, 0.0, -0.0, 1.0])
    rows = torch.cartesian_prod(values, values, values)
    b = quantize(rows, bins)
    assert b.min() == 0
    assert b.max() == bins - 1
    finite = rows.isfinite().all(-1)
    assert (b[finite].amin(-1) == 0).all()


# Without duplicates: theirs come out a rounding apart in plain products, and may straddle a bin's edge.
@given(batch=batches(ties=False), bins=st.integers(2, 30))
def test_binned_lists_are_the_exact_lists_of_the_quantised_reference(batch: Batch, bins: int) -> None:
    v, t, s = batch.leaves()
    similarity, images, texts = v @ t.T, v @ v.T, t @ t.T
    n = len(v)
    expected = [
        sum(plackett_luce_nll(s * x, quantize(y, bins)).mean() for x, y in ((a, b), (b, a))) / (2 * n)
        for a, b in ((similarity, similarity.T), (images, texts))
    ]
    found = RankConsistency(method="bin", bins=bins)(v, t, s, output_dict=True)
    for value, reference in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)
    actual, wanted = (gradients(sum(x), (v, t, s), 2.5) for x in (found.values(), expected))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@given(
    x=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    seed=st.integers(0, 2**16),
    bins=st.integers(2, 20),
)
def test_the_documented_bound_holds(x: list[float], seed: int, bins: int) -> None:
    scores = torch.tensor(x, dtype=torch.float64)
    y = torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    b = quantize(y, bins)
    excess = plackett_luce_nll(scores, b) - plackett_luce_nll(scores, y)
    bound = 0.0
    for k in b.unique():
        inside, below = scores[b == k].exp(), scores[b < k].exp().sum()
        bound += (len(inside) - 1) * math.log((below + inside.sum()) / (below + inside.min()))
    assert -1e-9 <= excess <= bound + 1e-9


def test_enough_bins_are_the_exact_order() -> None:
    batch = random_batch(0, 12, 5, 100.0)
    exact, binned = (RankConsistency(**o)(*batch.leaves()) for o in ({}, {"method": "bin", "bins": 10**6}))
    assert relative_error(binned, exact) < 1e-12


@pytest.mark.parametrize("s", [1 / 0.07, 100.0])
def test_the_error_shrinks_with_the_number_of_bins(s: float) -> None:
    batch = random_batch(0, 256, 64, s)
    v, t, _ = batch.leaves(torch.float32)
    exact = torch.stack(gradients(RankConsistency()(v, t, s), (v, t), 1.0))
    errors = [
        relative_error(
            torch.stack(gradients(RankConsistency(method="bin", bins=b)(v, t, s), (v, t), 1.0)), exact
        )
        for b in (64, 512, 4096, 32768)
    ]
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-3
