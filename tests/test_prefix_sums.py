from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankloss.prefix_sums import log_prefix_sum, log_suffix_sum


@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=20), st.sampled_from([0.01, 0.3, 1.0]))
def test_running_sums_are_logcumsumexp_whatever_the_span(values: list[float], factor: float) -> None:
    # Spans up to 600 nats are summed plainly, larger ones in log space.
    x = factor * torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(log_prefix_sum(x), x.logcumsumexp(-1), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(
        log_suffix_sum(x), x.flip(-1).logcumsumexp(-1).flip(-1), rtol=1e-13, atol=1e-12
    )


@pytest.mark.parametrize("smallest", [-599.0, -601.0])
def test_the_two_ways_of_summing_meet_at_the_limit_without_underflow(smallest: float) -> None:
    x = torch.tensor([smallest, smallest, 0.0], dtype=torch.float64)
    assert log_prefix_sum(x).tolist() == pytest.approx([smallest, smallest + math.log(2), 0.0], rel=1e-14)


def test_float32_is_summed_without_the_loss_of_float32_sums() -> None:
    x = torch.full((2, 100_000), -20.0)
    x[:, 0] = 0.0
    expected = x.double().logcumsumexp(-1)
    assert (log_prefix_sum(x).double() - expected).abs().max() < 1e-7


def test_nan_and_infinity_are_kept() -> None:
    assert log_prefix_sum(torch.tensor([1.0, math.nan, 2.0])).isnan().tolist() == [False, True, True]
    assert log_prefix_sum(torch.tensor([-math.inf, 1.0])).tolist() == [-math.inf, 1.0]
    assert log_prefix_sum(torch.tensor([1.0, math.inf])).tolist() == [1.0, math.inf]
