"""SigLIP's pass: value and gradients in chunks, against the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

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
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize(
    ("make", "same_id"),
    [
        *((rankloss.SigLipLoss, same_id) for same_id in (None, "ignore", "share")),
        *((rankloss.ClipLoss, same_id) for same_id in ("ignore", "share")),
    ],
)
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(
    make: Any, same_id: Any, budget: int | None, scalars: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []

    def apply(terms: Any, weights: Tensor, inputs: Any) -> Any:
        values, gradients = terms.stream(inputs, weights, True)
        shapes.append([x.shape for x in (*values, *gradients) if x is not None])
        return values

    monkeypatch.setattr(engine, "apply", apply)  # fake tensors have no autograd
    with fake_cuda() as copies:
        v, t = (torch.empty(32, 8, device="cuda") for _ in range(2))
        s, b = (10.0, -10.0) if scalars == "numbers" else (torch.empty((), device="cuda") for _ in range(2))
        of_ids = {"pair_ids": torch.empty(32, dtype=torch.int32, device="cuda")} if same_id else {}
        value = make(memory_budget=budget, same_id=same_id, chunk_size=7)(v, t, s, b, **of_ids)
        assert value.device == v.device
        assert copies.found == []
    numbers = [()] * (2 if make is rankloss.SigLipLoss else 1)
    assert shapes == ([] if budget is None else [[(), (32, 8), (32, 8), *numbers]])
