"""The definition: Plackett–Luce's own properties, and other libraries' numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.duration.hazard_regression import PHReg
from torch import Tensor

from batches import assert_close
from rankloss import dense, plackett_luce_nll, reference
from rankloss.options import RankOptions

top_ks = st.none() | st.integers(1, 12)  # also more than a list has items
UPSTREAM = 2.5
"""A gradient from above that is not 1."""


@st.composite
def scored_lists(
    draw: st.DrawFn, *, max_n: int = 10, min_n: int = 1, bound: float = 50.0
) -> tuple[Tensor, Tensor]:
    """Float64 scores of one list, and the reference that ranks it: tied in places, float64 or int64."""
    n = draw(st.integers(min_n, max_n))
    scores = draw(st.lists(st.floats(-bound, bound), min_size=n, max_size=n))
    y = draw(st.lists(st.integers(-n, n // 2), min_size=n, max_size=n))
    dtype = draw(st.sampled_from([torch.float64, torch.int64]))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(y, dtype=dtype)


# --- the model's own properties ---------------------------------------------------------------------------


def nll_of_all_rankings(scores: Tensor) -> Tensor:
    """Of N scores the negative log-likelihoods of each of the N! rankings, ``[N!]``."""
    rankings = itertools.permutations(range(len(scores)))
    references = torch.tensor(list(rankings), dtype=torch.float64)
    return plackett_luce_nll(scores.expand_as(references), references)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=5))
def test_probabilities_of_all_rankings_sum_to_one(scores) -> None:
    x = torch.tensor(scores, dtype=torch.float64)
    assert (-nll_of_all_rankings(x)).exp().sum().item() == pytest.approx(1, rel=1e-10)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=5, unique=True))
def test_the_likeliest_ranking_is_by_the_scores_themselves(scores) -> None:
    x = torch.tensor(scores, dtype=torch.float64)
    least = nll_of_all_rankings(x).min().item()
    assert plackett_luce_nll(x, x).item() == pytest.approx(least, rel=1e-10, abs=1e-10)


@settings(max_examples=20)
@given(scored_lists(bound=5.0), top_ks)
def test_derivatives_are_differences_of_the_values(lists, top_k: int | None) -> None:
    """First derivatives are differences of the value, second ones of the first."""
    x, y = lists
    x.requires_grad_()
    for check_by_differences in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_by_differences(lambda x: plackett_luce_nll(x, y, top_k=top_k), x, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 2])
def test_what_ranks_a_list_gets_no_gradient(top_k: int | None) -> None:
    x, y = (torch.tensor([0.3, 0.2, 0.9], requires_grad=True) for _ in range(2))
    plackett_luce_nll(x, y, top_k=top_k).backward()
    assert x.grad is not None
    assert y.grad is None


# --- independent oracles ----------------------------------------------------------------------------------


@given(scored_lists(), top_ks)
def test_value_and_gradient_are_those_of_the_literal_reference(
    lists: tuple[Tensor, Tensor], top_k: int | None
) -> None:
    x, y = lists
    x.requires_grad_()
    nll = plackett_luce_nll(x, y, top_k=top_k)
    expected = reference.plackett_luce(x, y, top_k=top_k)
    (gradient,) = torch.autograd.grad(UPSTREAM * nll, x)
    (expected_gradient,) = torch.autograd.grad(UPSTREAM * expected, x)
    assert_close([nll, gradient], [expected, expected_gradient], tolerance=1e-10)


@given(scored_lists(min_n=2, bound=20.0))
def test_matches_breslows_partial_likelihood_in_statsmodels(lists) -> None:
    # A risk set at time t is everyone who lives to t or longer: with time = const − y it is {q : y_q ≤ y_p}.
    x, y = lists
    times, covariates = (y.max() - y).numpy(), x.numpy()[:, None]
    coefficient = np.array([1.0])  # so that the scores themselves are the log-hazards
    expected = -PHReg(times, covariates, ties="breslow").loglike(coefficient)
    assert plackett_luce_nll(x, y).item() == pytest.approx(expected, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_far_apart_do_not_underflow(dtype: torch.dtype) -> None:
    """Summed by exp, cumsum and a logarithm with a floor of 1e-10, this list would give 50.9."""
    x = torch.tensor([0.0, -30.0, -40.0, -50.0], dtype=dtype)
    nll = plackett_luce_nll(x, torch.tensor([4, 3, 2, 1]))
    # An item's term is log(1 + Σ e^(x_q − x_p)) over the worse items q; the last item's is 0.
    differences_to_worse = [[-30, -40, -50], [-10, -20], [-10]]
    owed = sum(math.log1p(sum(map(math.exp, worse))) for worse in differences_to_worse)
    assert owed == pytest.approx(9.08e-5, rel=1e-3)  # far from the 50.9 above
    # A score of −40 stands among numbers 32·eps apart, 4e-6 in float32, and its term is rounded to one.
    assert nll.item() == pytest.approx(owed, rel=0, abs=16 * torch.finfo(dtype).eps)


def test_gradients_of_scores_a_thousand_nats_apart_are_exact() -> None:
    x = torch.tensor([0.0, -1000.0, -2000.0], requires_grad=True)
    plackett_luce_nll(x, torch.tensor([1.0, 2.0, 3.0])).backward()
    # The items of rank 1 and 2 are the third and the second; C_p is a sum over all that are no better.
    # Of both sums the first item, with score 0, has all but e^−1000: log C_p − x_p has the gradient
    # (1, 0, −1) for the third item, (1, −1, 0) for the second, and none for the first.
    assert x.grad.tolist() == [2.0, -1.0, -1.0]


@pytest.mark.parametrize("options", [{"worth": "shifted"}, {"ties": "random"}, {"discount": "log"}], ids=str)
def test_an_option_of_the_reference_alone_is_computed_by_it(options: Any) -> None:
    """By the module ``reference``; scores in float16 give float32 there, too."""
    x = torch.tensor([[0.3, -0.2, 0.7, 0.5], [0.1, 0.8, -0.4, 0.6]], dtype=torch.float16)
    y = torch.tensor([[2, 1, 1, 0], [0, 3, 3, 1]])
    torch.manual_seed(0)  # random ties are drawn alike in both calls
    nll = plackett_luce_nll(x, y, top_k=3, **options)
    torch.manual_seed(0)
    expected = reference.plackett_luce(x, y, top_k=3, **options)
    assert torch.equal(nll, expected)
    assert nll.dtype == torch.float32  # of scores in float16
    without_option = plackett_luce_nll(x, y, top_k=3)
    assert ((nll - without_option).abs() > 1e-3).all(), "the option changes both lists' values"


# --- shapes, dtypes, bad input ----------------------------------------------------------------------------


def test_leading_dimensions_are_lists() -> None:
    """Scores ``[2, 3, 5]`` have ``[2, 3]`` values, each that of its list alone."""
    x, y = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nll = plackett_luce_nll(x, y)
    one_by_one = [plackett_luce_nll(x[place], y[place]) for place in itertools.product(range(2), range(3))]
    assert_close([nll], [torch.stack(one_by_one).view(2, 3)], tolerance=1e-13)


@pytest.mark.parametrize("where", ["scores", "reference"])
def test_nan_in_gives_nan_value_and_gradient_in_its_list_only(where: str) -> None:
    lists = {"scores": torch.zeros(2, 4), "reference": torch.arange(8.0).view(2, 4)}
    lists[where][0, 1] = math.nan
    x, y = lists["scores"].requires_grad_(), lists["reference"]
    nll = plackett_luce_nll(x, y)
    nll.sum().backward()
    assert nll.isnan().tolist() == [True, False]
    assert x.grad.isnan().any(-1).tolist() == [True, False]


def test_top_one_probabilities_subtract_the_largest_cosine_before_they_scale() -> None:
    """A float32 product of about 630 has a rounding error of 3e-5, which would show in the probabilities."""
    y, scale = torch.tensor([0.9, 0.8999, -0.3]), torch.tensor(700.0)
    p = dense.top_one_probabilities(y, scale, RankOptions(model="top_one"))
    assert_close([p], [(scale.double() * y.double()).softmax(-1)], tolerance=1e-6)
