from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from batches import assert_close
from rankloss import plackett_luce_nll
from rankloss.options import RankOptions
from rankloss.ranking import Binned, Selected, Sorted, ascending, quantize, rank

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)  # zeros of both signs and subnormals too


# --- sorting ----------------------------------------------------------------------------------------------


def assert_sorted(x: Tensor) -> None:
    values, indices = ascending(x)
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, indices), values)
    assert torch.equal(indices.sort(dim=-1).values, torch.arange(x.shape[-1]).expand(x.shape))


@given(
    rows=hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_are_sorted_and_indices_say_where_they_came_from(rows, dtype) -> None:
    assert_sorted(torch.from_numpy(rows).to(dtype))


def test_float64_keeps_all_its_bits() -> None:
    x = torch.tensor([[1.0 + 2**-40, 1.0, 1.0 + 2**-41]], dtype=torch.float64)
    assert ascending(x)[1].tolist() == [[1, 2, 0]]


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


# --- the ranking of a list --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sorted),
        ({"top_k": 4}, Selected),  # sorts nothing
        ({"top_k": 5}, Sorted),
        ({"method": "bin", "bins": 4}, Binned),
        ({"method": "bin", "bins": 5}, Sorted),  # no slot more than there are items
        ({"method": "bin", "bins": 4, "top_k": 2}, Selected),
        ({"method": "bin", "bins": 4, "top_k": 9}, Sorted),
    ],
)
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_running_sums_are_those_of_the_formula(
    options, expected: type, looks: bool, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no look is free, as on an accelerator."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", looks)
    generator = torch.Generator().manual_seed(levels)
    y = torch.randint(levels, (40, 5), generator=generator).double()
    y[0] = 1.0  # all tied
    w = (40 * torch.rand(y.shape, generator=generator, dtype=torch.float64) - 20).exp()
    checked = RankOptions(**options)
    found = rank(y, checked)
    assert type(found) is expected
    given_worths = w.clone()
    denominators = found.denominators(w if found.order is None else w.gather(-1, found.order))
    assert torch.equal(w, given_worths)
    total = denominators[:, -1].clone()
    inverse = found.weigh(1 / denominators).flip(-1).cumsum(-1).flip(-1)
    of_items = found.of_items(inverse)
    if found.order is not None:
        of_items = torch.empty_like(y).scatter_(-1, found.order, of_items)

    level = quantize(y, checked.bins) if "bins" in options else y
    below = level[:, None, :] <= level[:, :, None]  # [list, p, q]
    C = (w[:, None] * below).sum(-1)
    counted = (level[:, None, :] > level[:, :, None]).sum(-1) < (checked.top_k or 5)
    U = (below * (counted / C)[:, :, None]).sum(1)
    assert_close([total, of_items], [w.sum(-1), U], 1e-12)
    torch.testing.assert_close(torch.as_tensor(found.items).expand(40, 1)[:, 0].long(), counted.sum(-1))
    assert found.counted is None or torch.equal(found.counted, counted)
    log_sum = found.weigh(denominators.log()).sum(-1)
    assert_close([log_sum], [(counted * C.log()).sum(-1)], 1e-12)


# --- bins -------------------------------------------------------------------------------------------------

lists = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12).map(torch.tensor)


@given(y=lists, bins=st.integers(2, 40))
def test_a_bin_never_decreases_with_the_reference_and_all_but_one_divide_the_range_of_the_rest(
    y: Tensor, bins: int
) -> None:
    b = quantize(y, bins)
    assert b.dtype == torch.int64
    assert (b[y.argsort()].diff() >= 0).all()
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
    assert (b.min(), b.max()) == (0, bins - 1)
    assert (b[rows.isfinite().all(-1)].amin(-1) == 0).all()


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
