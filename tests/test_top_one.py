"""``model="top_one"``: the cross-entropy between the softmaxes of two lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batches import Batch, batches, gradients, random_batch, relative_error
from fake_cuda import fake_cuda
from rankloss import ClipLoss, RankClipLoss, RankConsistency, dense, operator, reference
from rankloss.batch import Batch as Features
from rankloss.functional import cross_modal, in_modal
from rankloss.options import RankOptions

TERMS = {"cross_modal": (cross_modal, reference.cross_modal), "in_modal": (in_modal, reference.in_modal)}
terms = pytest.mark.parametrize("term", TERMS)
choices = st.fixed_dictionaries(
    {
        "diagonal": st.sampled_from([True, False]),
        "fixed_reference": st.sampled_from([None, "image", "text"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)


def written_out(term: str, v: Tensor, t: Tensor, s: Tensor | float) -> Tensor:
    """By torch's own cross-entropy with soft targets."""
    a, b = (v @ t.T, t @ v.T) if term == "cross_modal" else (v @ v.T, t @ t.T)
    x, y = s * a, s * b
    return (F.cross_entropy(x, y.detach().softmax(-1)) + F.cross_entropy(y, x.detach().softmax(-1))) / 2


@terms
@given(batch=batches(), chunk_size=st.none() | st.integers(1, 9), budget=st.sampled_from([None, 0]))
def test_is_torchs_cross_entropy_with_soft_targets(term, batch: Batch, chunk_size, budget) -> None:
    inputs = batch.leaves()
    value = TERMS[term][0](*inputs, model="top_one", chunk_size=chunk_size, memory_budget=budget)
    expected = written_out(term, *inputs)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(value, inputs, -1.7), gradients(expected, inputs, -1.7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@settings(max_examples=40)
@given(batch=batches(max_n=7), options=choices)
def test_matches_the_literal_numpy_reference(term, lists, batch: Batch, options) -> None:
    ours, theirs = TERMS[term]
    options = {"model": "top_one", "lists": lists, **options}
    actual = ours(batch.image, batch.text, batch.scale, **options)
    expected = theirs(batch.image.numpy(), batch.text.numpy(), batch.scale, **options)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10, atol=1e-10)


@terms
@given(batch=batches(), options=choices, chunk_size=st.none() | st.integers(1, 9))
def test_streaming_equals_plain_in_value_and_in_every_gradient(
    term, batch: Batch, options, chunk_size
) -> None:
    inputs = batch.leaves()
    checked = RankOptions(model="top_one", **options)
    value = TERMS[term][0](*inputs, model="top_one", chunk_size=chunk_size, **options)
    values = dense.row_lists_nll(Features.of(*inputs), term, checked)
    expected = {"mean": values.mean(), "sum": values.sum(), "none": values}[options["reduction"]]
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype).view_as(value)
    plain = torch.autograd.grad(expected, inputs, upstream, allow_unused=True, materialize_grads=True)
    for a, b in zip(gradients(value, inputs, upstream), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("s", [1.0, 1 / 0.07, 100.0])
def test_float32_is_right_at_every_scale(s: float) -> None:
    batch, results = random_batch(0, 128, 32, s, duplicates=5), []
    for dtype in (torch.float32, torch.float64):
        inputs = batch.leaves(dtype)
        value = RankConsistency(model="top_one", chunk_size=48)(*inputs)
        results.append([value, *gradients(value, inputs, 1.7)])
    (value, *actual), (expected_value, *expected) = results
    assert relative_error(value, expected_value) < 1e-5
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("s", [400.0, 3000.0])
@pytest.mark.parametrize("diagonal", [True, False])
def test_worths_that_float64_does_not_hold_are_summed_in_log_space(s: float, diagonal: bool) -> None:
    inputs = random_batch(1, 12, 3, s, duplicates=2).leaves()
    options = RankOptions(model="top_one", diagonal=diagonal)
    for term, (ours, _) in TERMS.items():
        value = ours(*inputs, model="top_one", diagonal=diagonal)
        expected = dense.row_lists_nll(Features.of(*inputs), term, options).mean()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(gradients(value, inputs, 2.0), gradients(expected, inputs, 2.0), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_pass_is_shared_with_the_base_and_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = Operations(), operator.stream

    def watched(*arguments):  # from the inside: a mode does not see into an operator
        with seen:
            return original(*arguments)

    monkeypatch.setattr(operator, "stream", watched)
    # NumPy sorts float32, out of the mode's sight; torch sorts float64.
    inputs = random_batch(0, 10, 4, 10.0).leaves()
    loss = RankClipLoss(schedule="constant", model="top_one", normalizer=0.3)
    value = loss(*inputs)
    expected = ClipLoss()(*inputs) + 0.3 * (
        written_out("cross_modal", *inputs) + written_out("in_modal", *inputs)
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients(value, inputs, 2.5), gradients(expected, inputs, 2.5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert "mm" in seen.names
    assert not {"sort", "argsort", "topk", "cumsum"} & seen.names
    RankConsistency()(*inputs)
    assert {"sort", "cumsum"} <= seen.names


def test_two_pairs_without_the_diagonal_say_nothing() -> None:
    batch = random_batch(0, 2, 3, 10.0)
    for loss, _ in TERMS.values():
        value = loss(batch.image, batch.text, batch.scale, model="top_one", diagonal=False)
        assert abs(value) < 1e-12


@pytest.mark.parametrize("lists", ["row", "batch"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_or_infinity_in_a_feature_gives_nan(lists: str, bad: float, where: int) -> None:
    for loss, _ in TERMS.values():
        inputs = random_batch(0, 4, 3, 10.0).leaves(torch.float32)
        inputs[where].data[1, 2] = bad
        value = loss(*inputs, lists=lists, model="top_one")
        assert value.isnan()
        assert all(g.isnan().any() for g in gradients(value, inputs, 1.0))


@pytest.mark.parametrize(
    "options", [{}, {"diagonal": False}, {"fixed_reference": "text"}, {"reduction": "none"}]
)
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(options) -> None:
    checked = RankOptions(model="top_one", chunk_size=16, **options)
    with fake_cuda() as copies:
        v, t = (torch.empty(32, 8, device="cuda") for _ in range(2))
        features = Features.of(v, t, 10.0)
        weights = torch.empty(3, dtype=torch.float64, device="cuda")
        wanted = [True, True, False, False, True]
        call = operator._Call(
            *features.inputs, weights, None, None, None, 0, [True] * 3, wanted, checked.encoded
        )
        upstream = [torch.empty((32,) if checked.reduction == "none" else (), device="cuda")] * 3
        operator._run(call, *call.unpacked(upstream), wanted)
        assert copies.found == []
