"""SigLIP's pass: value and gradients in chunks, against the formula."""

from __future__ import annotations

import math

import pytest
import torch

import rankloss
from fake_cuda import fake_cuda
from rankloss import engine
from rankloss.losses.siglip import PairSigmoid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_exact_from_where_a_pair_is_certain_to_where_it_is_hopeless(dtype: torch.dtype) -> None:
    """One pair has one logit, s·c + b, over the range of log(1 + e^y) and beyond that of e^y."""
    one = torch.ones(1, 1, dtype=dtype)
    for logit in (-300.0, -90.0, -38.0, -20.0, -1.0, 0.0, 1.0, 20.0, 38.0, 60.0, 90.0, 300.0):
        b = torch.tensor(logit - 1, dtype=dtype, requires_grad=True)
        weights = torch.ones(1, dtype=torch.float64)
        (value,) = engine.apply(PairSigmoid(0, None), weights, [one, one, torch.ones((), dtype=dtype), b])
        expected = math.log1p(math.exp(-logit)) if logit > 0 else -logit + math.log1p(math.exp(logit))
        slope = -math.exp(-logit) / (1 + math.exp(-logit)) if logit > 0 else -1 / (1 + math.exp(logit))
        assert value.dtype == dtype
        # float32 holds nothing below 1e-45.
        tolerance = {"rel": 4 * torch.finfo(dtype).eps, "abs": 1e-37 if dtype == torch.float32 else 0}
        assert value.item() == pytest.approx(expected, **tolerance)
        assert torch.autograd.grad(value, b)[0].item() == pytest.approx(slope, **tolerance)


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(scalars: str) -> None:
    with fake_cuda() as copies:
        v, t = (torch.empty(32, 8, device="cuda") for _ in range(2))
        s, b = (10.0, -10.0) if scalars == "numbers" else (torch.empty((), device="cuda") for _ in range(2))
        value = rankloss.SigLipLoss(memory_budget=0)(v, t, s, b)
        assert value.device == v.device
        inputs = (v, t, *(torch.empty((), device="cuda") for _ in range(2)))
        weights = torch.ones(1, device="cuda")
        (value,), found = PairSigmoid(0, 7).stream(inputs, weights, True)
        assert [x.shape for x in (value, *found)] == [(), (32, 8), (32, 8), (), ()]
        assert copies.found == []
