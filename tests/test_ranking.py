from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from rankloss.log_sums import log_cumsum_exp
from rankloss.ranking import ascending, quantize

# --- sorting ----------------------------------------------------------------------------------------------


def rows_of_floats(bits: int) -> st.SearchStrategy[np.ndarray]:
    """Arrays of up to nine rows of up to nine finite numbers."""
    return hnp.arrays(
        f"float{bits}",
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(width=bits, allow_nan=False, allow_infinity=False),
    )


@given(st.sampled_from([32, 64]).flatmap(rows_of_floats))
def test_values_are_sorted_and_indices_say_where_they_came_from(rows: np.ndarray) -> None:
    """Drawn values have ties, zeros of both signs and subnormal numbers; torch's own sort is the oracle."""
    x = torch.from_numpy(rows)
    values, indices = ascending(x, by_numpy=True)
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, indices), values)
    every_place_once = torch.arange(x.shape[-1]).expand(x.shape)
    assert torch.equal(indices.sort(dim=-1).values, every_place_once)


def test_flushed_subnormals_lose_no_index() -> None:
    """A CPU that takes subnormal numbers for 0 may order them and the zeros in any way."""
    smallest_normal = torch.finfo(torch.float32).tiny
    x = torch.tensor([[0.0, 1.0, -0.0, 1e-42, -1.0, 0.0, -1e-42, smallest_normal]])
    place_of_smallest, places_of_largest = [4], [7, 1]
    places_of_zeros_and_subnormals = {0, 2, 3, 5, 6}
    assert torch.set_flush_denormal(True), "this CPU cannot flush"
    try:
        values, indices = ascending(x, by_numpy=True)
    finally:
        torch.set_flush_denormal(False)
    (order,) = indices.tolist()
    assert order[:1] == place_of_smallest
    assert {*order[1:-2]} == places_of_zeros_and_subnormals
    assert order[-2:] == places_of_largest
    assert (values.diff() >= 0).all()


# --- bins -------------------------------------------------------------------------------------------------

references = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12).map(torch.tensor)
any_reference_and_bins = given(reference=references, count=st.integers(2, 40))


@any_reference_and_bins
def test_a_bin_never_decreases_with_the_reference(reference: Tensor, count: int) -> None:
    bins = quantize(reference, count)
    assert bins.dtype == torch.int64
    assert (bins[reference.argsort()].diff() >= 0).all()


@any_reference_and_bins
def test_the_worst_item_has_the_first_bin_and_the_best_alone_the_last(reference: Tensor, count: int) -> None:
    """Where all items are tied, all have the first bin."""
    bins = quantize(reference, count)
    all_are_tied = reference.min() == reference.max()
    is_best = (reference == reference.max()) & ~all_are_tied
    assert bins.min() == 0
    assert torch.equal(bins == count - 1, is_best)


@any_reference_and_bins
def test_the_other_bins_divide_the_range_of_the_rest(reference: Tensor, count: int) -> None:
    """All items but the best share the bins 0 to count − 2, each of which is an equal part of their range.

    An item that a rounding moves over an edge is in the next bin.
    """
    is_rest = reference < reference.max()
    rest = reference[is_rest].double()
    bins = quantize(reference, count)[is_rest]
    has_a_range = len(rest) > 0 and rest.max() - rest.min() > 1e-30  # not near the least that float32 holds
    if has_a_range:
        assert bins.max() == count - 2
        width = (rest.max() - rest.min()) / (count - 1)
        in_widths = (rest - rest.min()) / width
        of_rounding = 1e-4
        assert ((in_widths - bins).abs() <= 1 + of_rounding).all()


@pytest.mark.parametrize("bins", [2, 3, 2**24])
def test_every_bin_is_in_range_whatever_the_reference_holds(bins: int) -> None:
    """Lists of finite numbers also have the first bin; in the others its item may have no order."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-42, 0.0, -0.0, 1.0])
    lists = torch.cartesian_prod(values, values, values)  # all triples of the values
    bins_of_items = quantize(lists, bins)
    assert (bins_of_items.min(), bins_of_items.max()) == (0, bins - 1)
    of_finite_lists = bins_of_items[lists.isfinite().all(-1)]
    assert (of_finite_lists.amin(-1) == 0).all()


# --- running sums -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1.0, 30.0, 1000.0]))
def test_values_and_derivatives_are_those_of_the_definition(seed: int, n: int, span: float) -> None:
    """The p-th number is log Σ exp of the first p; derivatives are compared with difference quotients."""
    x = span * torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([x[:, : p + 1].logsumexp(-1) for p in range(n)], -1)
    torch.testing.assert_close(log_cumsum_exp(x), expected, rtol=1e-14, atol=1e-14)
    if span < 1000:  # the test below has the derivatives at larger ones
        x.requires_grad_()
        assert torch.autograd.gradcheck(log_cumsum_exp, x, atol=1e-6)
        assert torch.autograd.gradgradcheck(log_cumsum_exp, x, atol=1e-6)


def test_beyond_the_range_of_exp_the_derivatives_are_finite() -> None:
    """The first sum is −3000, the first number itself, and the third 3000, the second, to all digits.

    So both have the gradient 1 by that number, which is constant: second derivatives are 0.
    """
    x = torch.tensor([-3000.0, 3000.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    first_sum, _, third_sum, _ = log_cumsum_exp(x)
    (gradient,) = torch.autograd.grad(first_sum + third_sum, x, create_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    any_direction = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (second,) = torch.autograd.grad(gradient @ any_direction, x)
    torch.testing.assert_close(second, torch.zeros_like(x), rtol=0, atol=1e-11)
