from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from rankloss.log_sums import log_cumsum_exp


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1.0, 30.0, 1000.0]))
def test_values_and_derivatives_are_those_of_the_definition(seed: int, n: int, span: float) -> None:
    x = span * torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    owed = torch.stack([x[:, : p + 1].logsumexp(-1) for p in range(n)], -1)
    torch.testing.assert_close(log_cumsum_exp(x), owed, rtol=1e-14, atol=1e-14)
    if span < 1000:
        x.requires_grad_()
        assert gradcheck(log_cumsum_exp, x, atol=1e-6)
        assert gradgradcheck(log_cumsum_exp, x, atol=1e-6)


def test_beyond_the_range_of_exp_the_derivatives_are_finite() -> None:
    x = torch.tensor([-3000.0, 3000.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(log_cumsum_exp(x)[[0, 2]].sum(), x, create_graph=True)
    torch.testing.assert_close(first, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    (second,) = torch.autograd.grad(first @ torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), x)
    torch.testing.assert_close(second, torch.zeros_like(x), rtol=0, atol=1e-11)
