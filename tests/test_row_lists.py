from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from batches import Batch, batches, gradients, random_batch
from rankloss import ClipLoss, RankClipLoss, RankConsistency, dense, plans, row_lists, streaming
from rankloss.embeddings import Embeddings
from rankloss.options import RankOptions
from rankloss.plans import choose_plan

WEIGHTS = torch.tensor([0.8, 1.3, 0.6], dtype=torch.float64)


def plain(v: Tensor, t: Tensor, s: Tensor, options: RankOptions) -> list[Tensor]:
    """The three weighted terms, by autograd."""
    e, n = Embeddings.of(v, t, s), len(v) if options.diagonal else len(v) - 1
    values = [dense.row_lists_cross_entropy(e).mean()]
    for term in ("cross_modal", "in_modal"):
        values.append(dense.row_lists_nll(e, term, options).mean() / n)
    return [w * x for w, x in zip(WEIGHTS, values, strict=True)]


@given(
    batch=batches(),
    method=st.sampled_from(["sort", "bin"]),
    budget=st.sampled_from([0, None]),
    chunk_size=st.none() | st.integers(1, 9),
    discount=st.sampled_from([None, "log"]),
    top_k=st.none() | st.integers(1, 9),
    diagonal=st.sampled_from([True, False]),
    fixed_reference=st.sampled_from([None, "image", "text"]),
    upstream=st.sampled_from([(2.5, 2.5, 2.5), (1.0, -2.0, 0.5), (0.0, 1.5, 0.0)]),
)
def test_every_engine_and_plan_equals_the_plain_terms(
    batch: Batch, method, budget, chunk_size, discount, top_k, diagonal, fixed_reference, upstream
) -> None:
    options = RankOptions(
        discount=discount,
        top_k=top_k,
        diagonal=diagonal,
        fixed_reference=fixed_reference,
        method=method,
        bins=9,
        chunk_size=chunk_size,
        memory_budget=budget,
    )
    inputs = v, t, s = batch.leaves()
    terms = row_lists.row_lists(Embeddings.of(v, t, s), options, WEIGHTS, (True, True, True))
    expected = plain(v, t, s, options)
    for a, b in zip(terms, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if upstream[1] == 0:
        del terms
        return
    found, wanted = (
        sum(u * x for u, x in zip(upstream, values, strict=True)) for values in (terms, expected)
    )
    for a, b in zip(gradients(found, inputs, 1.0), gradients(wanted, inputs, 1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"method": "bin"}, {"diagonal": False}, {"memory_budget": 0}])
def test_lists_are_ranked_and_summed_a_part_of_a_chunk_at_a_time(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_batch(0, 23, 5, 10.0, duplicates=2).leaves()

    def value_and_gradients() -> list[Tensor]:
        value = RankClipLoss(schedule="constant", chunk_size=11, **options)(*inputs)
        return [value.detach(), *gradients(value, inputs, -1.3)]

    whole = value_and_gradients()
    monkeypatch.setitem(plans._RANKED, "cpu", 23 * 4)
    monkeypatch.setitem(plans._SLICE, "cpu", 23 * 3)
    plan = RankConsistency(chunk_size=11).plan(23)
    assert (plan.chunk_size, plan.ranked_size, plan.slice_size) == (11, 4, 3)
    for part, of_whole in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(part, of_whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_term_that_is_not_used_has_no_part_in_the_gradient(used: tuple[int, ...]) -> None:
    inputs = v, t, s = random_batch(3, 9, 5, 20.0, duplicates=2).leaves()
    terms = row_lists.row_lists(Embeddings.of(v, t, s), RankOptions(), WEIGHTS, (True,) * 3)
    expected = plain(v, t, s, RankOptions())
    found, wanted = (gradients(sum(x[k] for k in used), inputs, 1.7) for x in (terms, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(
    batch=batches(min_n=4),
    method=st.sampled_from(["sort", "bin"]),
    diagonal=st.booleans(),
    chunk_size=st.none() | st.integers(1, 5),
)
def test_a_share_of_the_anchors_has_the_values_that_it_has_in_the_whole(
    batch: Batch, method, diagonal, chunk_size
) -> None:
    """What a process computes with ``local_loss``: its own rows, whose place among the items it knows."""
    v, t, s = batch.leaves()
    options = RankOptions(method=method, bins=9, reduction="none", diagonal=diagonal, chunk_size=chunk_size)
    whole = row_lists.row_lists(Embeddings.of(v, t, s), options, WEIGHTS, (False, True, True))
    share = slice(1, 3)
    embeddings = Embeddings.of(v, t, s, image_anchors=v[share], text_anchors=t[share])
    values = row_lists.row_lists(embeddings, options, WEIGHTS, (False, True, True), first_row=1)
    for a, b in zip(values[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b[share], rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(values[1].sum() - 2 * values[2].sum(), (v, t, s))
    expected = torch.autograd.grad(whole[1][share].sum() - 2 * whole[2][share].sum(), (v, t, s))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("budget", [0, None])
def test_only_the_gradients_that_are_wanted_are_computed(wanted, budget) -> None:
    batch = random_batch(2, 6, 4, 10.0)
    leaves = [x.detach().requires_grad_(w) for x, w in zip(batch.leaves(torch.float32), wanted, strict=True)]
    criterion = RankClipLoss(schedule="constant", memory_budget=budget)
    criterion(*leaves).backward()
    full = batch.leaves(torch.float32)
    expected = gradients(criterion(*full), full, 1.0)
    for x, w, g in zip(leaves, wanted, expected, strict=True):
        assert (x.grad is not None) == w
        if w:
            torch.testing.assert_close(x.grad, g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("s", [400.0, 3000.0])
@pytest.mark.parametrize("method", ["sort", "bin"])
def test_worths_that_float64_does_not_hold_are_summed_in_log_space(s: float, method: str) -> None:
    inputs = v, t, scale = random_batch(1, 12, 3, s, duplicates=2).leaves()
    options = RankOptions(method=method, bins=7)
    terms = row_lists.row_lists(Embeddings.of(v, t, scale), options, WEIGHTS, (True,) * 3)
    expected = plain(v, t, scale, options)
    for a, b in zip(gradients(sum(terms), inputs, 2.0), gradients(sum(expected), inputs, 2.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sum(terms), sum(expected), rtol=1e-10, atol=1e-10)


# --- the fused loss ---------------------------------------------------------------------------------------


class Unfused(ClipLoss):
    """CLIP's loss under another name, which the rank terms' pass does not recognise."""


@given(batch=batches(), worth=st.sampled_from(["exp", "shifted"]))
def test_fused_and_separate_base_are_one_loss(batch: Batch, worth: str) -> None:
    options = {"schedule": "constant", "lambda_in": 0.4, "worth": worth}
    inputs = batch.leaves()
    fused, separate = (RankClipLoss(base, **options)(*inputs, output_dict=True) for base in (None, Unfused()))
    assert list(fused) == list(separate)
    for key, value in fused.items():
        torch.testing.assert_close(value, separate[key], rtol=1e-10, atol=1e-10)
    for a, b in zip(
        gradients(sum(fused.values()), inputs, 2.5),
        gradients(sum(separate.values()), inputs, 2.5),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_logit_bias_stays_in_the_graph_of_the_fused_loss() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    loss = RankClipLoss(schedule="constant")
    value = loss(v, t, s, bias)
    assert torch.autograd.grad(value, bias)[0] == 0
    torch.testing.assert_close(value, loss(v, t, s), rtol=1e-12, atol=0)


# --- compilers and transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize("lists", ["row", "batch"])
def test_compiles_into_one_graph_and_is_not_compiled_again_when_lambda_changes(lists: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    loss = RankClipLoss(lists=lists)
    loss.set_epoch(1, 10)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    inputs = random_batch(0, 8, 4, 10.0, duplicates=2).leaves(torch.float32)
    for epoch in (1, 4, 7):
        loss.set_epoch(epoch, 10)
        expected = loss(*inputs)
        value = compiled(*inputs)
        torch.testing.assert_close(value, expected)
        for a, b in zip(gradients(value, inputs, 2.5), gradients(expected, inputs, 2.5), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_differentiates_inside_a_compiled_graph() -> None:
    torch._dynamo.reset()
    loss = RankClipLoss(schedule="constant", method="bin", bins=8)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    inputs = random_batch(0, 8, 4, 10.0).leaves(torch.float32)
    expected = gradients(loss(*inputs), inputs, 2.5)
    for a, b in zip(gradients(compiled(*inputs), inputs, 2.5), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_keep_the_contract_of_torch_library(reduction: str) -> None:
    v, t, s = random_batch(0, 5, 3, 10.0).leaves()
    options = RankOptions(reduction=reduction)
    terms = [reduction == "mean", True, True]
    arguments = (v, t, None, None, s, WEIGHTS, None, 0, terms, [True, True, False, False, True])
    torch.library.opcheck(
        torch.ops.rankloss.row_lists.default,
        (*arguments, options.encoded),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_torch_func_is_right_or_refused() -> None:
    v, t, s = random_batch(0, 6, 3, 10.0).leaves()
    criterion = RankConsistency()
    expected = gradients(criterion(v, t, s), (v, t, s), 1.0)
    try:
        found = torch.func.grad(criterion, argnums=(0, 1, 2))(v.detach(), t.detach(), s.detach())
    except RuntimeError as error:  # torch 2.13 refuses operators whose autograd is written in Python
        assert "functorch transforms" in str(error)  # noqa: PT017
    else:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["sort", "bin"])
@pytest.mark.parametrize("plan", ["rows", "shared"])
@pytest.mark.parametrize("ranks", [{}, {"discount": "log", "top_k": 3}])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_step_on_an_accelerator_never_waits_for_it(
    method: str, plan: str, ranks, diagonal: bool, monkeypatch
) -> None:
    """Tensors without values stand in for a device: looking at one, as a synchronisation does, raises."""
    monkeypatch.setattr(torch, "autocast", lambda **_: contextlib.nullcontext())  # which meta does not have
    v, t = (F.normalize(torch.empty(64, 8, device="meta"), dim=-1) for _ in range(2))
    s = torch.empty((), device="meta")
    embeddings = Embeddings.of(v, t, s)
    budget = 0 if plan == "rows" else None
    chosen = choose_plan(64, 64, v.device, v.dtype, chunk_size=16, memory_budget=budget)
    assert chosen.name == plan
    options = RankOptions(method=method, bins=32, diagonal=diagonal, **ranks)
    problem = streaming.Problem(options, chosen)
    weight = torch.empty((), dtype=torch.float64, device="meta") * embeddings.nan_unless_finite
    into = streaming.Gradients(torch.zeros_like(v), torch.zeros_like(t), None, None, torch.zeros_like(s))
    values = streaming.stream(embeddings, None, problem, streaming.Weights(weight, weight, weight), into)
    assert all(x is not None and x.shape == (64,) for x in values)
    with pytest.raises(RuntimeError, match="meta"):
        bool(s > 0)  # such a look would be seen
