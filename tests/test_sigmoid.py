"""SigLIP's pass: value and gradients in chunks, against the formula; the contract of its operator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batches import Batch, batches, gradients, random_batch
from fake_cuda import fake_cuda
from oracle import siglip as formula
from rankloss.sigmoid import pair_sigmoid, plain, stream

BIASES = [-10.0, 0.0, 3.0]


def leaves(batch: Batch, bias: float, share: slice = slice(None)) -> tuple[Tensor, ...]:
    v, t, s = batch.leaves()
    b = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    return v.detach()[share].requires_grad_(), t, s, b


@given(batch=batches(min_n=4), bias=st.sampled_from(BIASES), chunk=st.integers(1, 13), share=st.booleans())
def test_chunks_add_up_to_the_formula(batch: Batch, bias: float, chunk: int, share: bool) -> None:
    inputs = leaves(batch, bias, slice(1, 3) if share else slice(None))
    with torch.no_grad():  # as below an operator's autograd
        value, found = stream(inputs, int(share), [True] * 4, chunk)
    expected = formula(*inputs, int(share))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain(inputs, int(share)), expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, gradients(expected, inputs, 1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_only_the_gradients_that_are_wanted_are_computed(wanted: tuple[bool, ...]) -> None:
    inputs = leaves(random_batch(2, 6, 4, 10.0), -3.0)
    leave = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    value = pair_sigmoid(*leave, 0)
    expected = formula(*inputs)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    assert value.requires_grad == any(wanted)
    if not any(wanted):
        return
    (-1.3 * value).backward()
    for x, w, g in zip(leave, wanted, gradients(expected, inputs, -1.3), strict=True):
        assert (x.grad is not None) == w
        if w:
            torch.testing.assert_close(x.grad, g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_exact_from_where_a_pair_is_certain_to_where_it_is_hopeless(dtype: torch.dtype) -> None:
    """One pair has one logit, s·c + b, over the range of log(1 + e^y) and beyond that of e^y."""
    one = torch.ones(1, 1, dtype=dtype)
    for logit in (-300.0, -90.0, -38.0, -20.0, -1.0, 0.0, 1.0, 20.0, 38.0, 60.0, 90.0, 300.0):
        b = torch.tensor(logit - 1, dtype=dtype, requires_grad=True)
        value = pair_sigmoid(one, one, 1.0, b, 0)
        expected = math.log1p(math.exp(-logit)) if logit > 0 else -logit + math.log1p(math.exp(logit))
        slope = -math.exp(-logit) / (1 + math.exp(-logit)) if logit > 0 else -1 / (1 + math.exp(logit))
        assert value.dtype == dtype
        # float32 holds nothing below 1e-45.
        tolerance = {"rel": 4 * torch.finfo(dtype).eps, "abs": 1e-37 if dtype == torch.float32 else 0}
        assert value.item() == pytest.approx(expected, **tolerance)
        assert torch.autograd.grad(value, b)[0].item() == pytest.approx(slope, **tolerance)


def test_it_can_be_differentiated_again() -> None:
    inputs = leaves(random_batch(3, 7, 4, 5.0), -1.0)

    def second(value: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(1.7 * value, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for a, b in zip(second(pair_sigmoid(*inputs, 0)), second(formula(*inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_feature_that_is_not_finite_makes_value_and_gradients_nan(bad: float, where: int) -> None:
    inputs = leaves(random_batch(0, 5, 3, 10.0), -10.0)
    with torch.no_grad():
        inputs[where][2, 1] = bad
    value = pair_sigmoid(*inputs, 0)
    assert value.isnan()
    assert all(g.isnan().all() for g in gradients(value, inputs, 1.0))


def test_the_operator_keeps_the_contract_of_torch_library() -> None:
    inputs = leaves(random_batch(0, 5, 3, 10.0), -1.0, slice(1, 4))
    for wanted in ([True] * 4, [True, False, False, True]):
        torch.library.opcheck(
            torch.ops.rankloss.pair_sigmoid.default,
            (*(x.detach() for x in inputs), 1, wanted, None),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(scalars: str) -> None:
    with fake_cuda() as copies:
        v, t = (torch.empty(32, 8, device="cuda") for _ in range(2))
        s, b = (10.0, -10.0) if scalars == "numbers" else (torch.empty((), device="cuda") for _ in range(2))
        value = pair_sigmoid(v, t, s, b, 0)
        assert value.device == v.device
        # In a fake mode an operator runs its shape function: what it does itself is called by hand.
        inputs = (v, t, *(torch.empty((), device="cuda") for _ in range(2)))
        value, found = stream(inputs, 0, [True] * 4, 7)
        assert [x.shape for x in (value, *found)] == [(), (32, 8), (32, 8), (), ()]
        assert copies.found == []
