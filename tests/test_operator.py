from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException

from batches import Batch, batches, gradients, random_batch
from fake_cuda import fake_cuda
from interpreter import few_examples, interpreted, needs_triton
from rankloss import ClipLoss, RankClipLoss, RankConsistency, SigLipLoss, dense, operator
from rankloss import options as options_module
from rankloss.batch import Batch as Features
from rankloss.operator import weighted_terms
from rankloss.options import RankOptions

WEIGHTS = torch.tensor([0.8, 1.3, 0.6], dtype=torch.float64)


def plain(v: Tensor, t: Tensor, s: Tensor, options: RankOptions) -> list[Tensor]:
    """The three weighted terms, by autograd."""
    e = Features.of(v, t, s)
    values = [dense.row_lists_cross_entropy(e).mean()]
    for term in ("cross_modal", "in_modal"):
        values.append(dense.row_lists_nll(e, term, options).mean())
    return [w * x for w, x in zip(WEIGHTS, values, strict=True)]


engines = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["sort", "bin"]),
        "memory_budget": st.sampled_from([0, None]),
        "chunk_size": st.none() | st.integers(1, 9),
        "discount": st.sampled_from([None, "log"]),
        "top_k": st.none() | st.integers(1, 9),
        "diagonal": st.sampled_from([True, False]),
        "fixed_reference": st.sampled_from([None, "image", "text"]),
    }
)
upstreams = st.sampled_from([(2.5, 2.5, 2.5), (1.0, -2.0, 0.5), (0.0, 1.5, 0.0)])


def in_float64(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in inputs)


def assert_agree(found: Iterable[Tensor], wanted: Iterable[Tensor], tolerance: float) -> None:
    """Tensor by tensor; the tolerance is relative to a tensor's norm, or to 1 where that is larger."""
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm().clamp_min(1.0)


def assert_equal_to_the_plain_terms(
    batch: Batch, options: RankOptions, upstream, dtype: torch.dtype, tolerances: tuple[float, float]
) -> None:
    """In value and in every gradient, against autograd in float64 at the same features."""
    inputs = batch.leaves(dtype)
    exact = in_float64(inputs)
    terms = operator.row_lists(Features.of(*inputs), options, WEIGHTS, (True, True, True))
    expected = plain(*exact, options)
    assert_agree(terms, expected, tolerances[0])
    found, wanted = (
        sum(u * x for u, x in zip(upstream, values, strict=True)) for values in (terms, expected)
    )
    assert_agree(gradients(found, inputs, 1.0), gradients(wanted, exact, 1.0), tolerances[1])


@given(batch=batches(), engine=engines, upstream=upstreams)
def test_every_engine_and_plan_equals_the_plain_terms(batch: Batch, engine, upstream) -> None:
    options = RankOptions(bins=9, **engine)
    assert_equal_to_the_plain_terms(batch, options, upstream, torch.float64, (1e-10, 1e-9))


@needs_triton
@few_examples(5)
@given(batch=batches(max_n=5), engine=engines, upstream=upstreams)
def test_the_fused_kernels_equal_the_plain_terms(batch: Batch, engine, upstream) -> None:
    options = RankOptions(bins=9, kernel="triton", **engine)
    with interpreted():
        assert_equal_to_the_plain_terms(batch, options, upstream, torch.float32, (1e-5, 1e-4))


@pytest.mark.parametrize("options", [{}, {"method": "bin"}, {"diagonal": False}, {"memory_budget": 0}])
def test_lists_are_ranked_and_summed_a_part_of_a_chunk_at_a_time(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_batch(0, 23, 5, 10.0, duplicates=2).leaves()

    def value_and_gradients() -> list[Tensor]:
        value = RankClipLoss(schedule="constant", chunk_size=11, **options)(*inputs)
        return [value.detach(), *gradients(value, inputs, -1.3)]

    whole = value_and_gradients()
    monkeypatch.setitem(options_module._RANKED, "cpu", 23 * 4)
    monkeypatch.setitem(options_module._SLICE, "cpu", 23 * 3)
    plan = RankConsistency(chunk_size=11).plan(23)
    assert (plan.chunk_size, plan.ranked_size, plan.slice_size) == (11, 4, 3)
    for part, of_whole in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(part, of_whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_term_that_is_not_used_has_no_part_in_the_gradient(used: tuple[int, ...]) -> None:
    inputs = v, t, s = random_batch(3, 9, 5, 20.0, duplicates=2).leaves()
    terms = operator.row_lists(Features.of(v, t, s), RankOptions(), WEIGHTS, (True,) * 3)
    expected = plain(v, t, s, RankOptions())
    found, wanted = (gradients(sum(x[k] for k in used), inputs, 1.7) for x in (terms, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


shares = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["sort", "bin"]),
        "diagonal": st.booleans(),
        "chunk_size": st.none() | st.integers(1, 5),
    }
)


def assert_a_share_is_that_of_the_whole(
    batch: Batch, options: RankOptions, dtype: torch.dtype, tolerances: tuple[float, float]
) -> None:
    v, t, s = batch.leaves(dtype)
    whole = operator.row_lists(Features.of(v, t, s), options, WEIGHTS, (False, True, True))
    share = slice(1, 3)
    embeddings = Features.of(v, t, s, image_anchors=v[share], text_anchors=t[share], first_row=1)
    values = operator.row_lists(embeddings, options, WEIGHTS, (False, True, True))
    assert_agree(values[1:], [x[share] for x in whole[1:]], tolerances[0])
    found = torch.autograd.grad(values[1].sum() - 2 * values[2].sum(), (v, t, s))
    expected = torch.autograd.grad(whole[1][share].sum() - 2 * whole[2][share].sum(), (v, t, s))
    assert_agree(found, expected, tolerances[1])


@given(batch=batches(min_n=4), lists=shares)
def test_a_share_of_the_anchors_has_the_values_that_it_has_in_the_whole(batch: Batch, lists) -> None:
    """What a process computes with ``local_loss``: its own rows, whose place among the items it knows."""
    options = RankOptions(bins=9, reduction="none", **lists)
    assert_a_share_is_that_of_the_whole(batch, options, torch.float64, (1e-10, 1e-10))


@needs_triton
@few_examples(2)
@given(batch=batches(min_n=4, max_n=5), lists=shares)
def test_a_share_has_the_same_values_by_the_fused_kernels(batch: Batch, lists) -> None:
    options = RankOptions(bins=9, reduction="none", kernel="triton", **lists)
    with interpreted():
        assert_a_share_is_that_of_the_whole(batch, options, torch.float32, (1e-5, 1e-4))


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
    terms = operator.row_lists(Features.of(v, t, scale), options, WEIGHTS, (True,) * 3)
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


@pytest.mark.parametrize("loss", [RankConsistency(), ClipLoss(memory_budget=0), SigLipLoss(memory_budget=0)])
def test_an_exported_graph_differentiates_by_what_takes_a_gradient_where_it_runs(
    loss: torch.nn.Module,
) -> None:
    inputs = random_batch(2, 7, 4, 10.0).leaves()
    exported = torch.export.export(loss, tuple(x.detach() for x in inputs)).module()
    for wanted in (inputs, inputs[1:2]):
        found = torch.autograd.grad(-1.3 * exported(*inputs), wanted)
        owed = torch.autograd.grad(-1.3 * loss(*inputs), wanted)
        assert_agree(found, owed, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_keep_the_contract_of_torch_library(reduction: str) -> None:
    v, t, s = random_batch(0, 5, 3, 10.0).leaves()
    options = RankOptions(reduction=reduction)
    terms = [reduction == "mean", True, True]
    arguments = (v, t, None, None, s, WEIGHTS, None, None, None, 0, terms, [True, True, False, False, True])
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


LIKELIHOODS = [
    {},
    {"discount": "log", "top_k": 3},
    {"top_k": 9},
    {"worth": "shifted"},
    {"worth": "identity", "top_k": 2},
]
LISTS = [
    {"method": method, "memory_budget": budget, "diagonal": diagonal}
    for method, budget, diagonal in itertools.product(["sort", "bin"], [0, None], [True, False])
]
LISTS += [
    {"ties": "random"},
    {"reduction": "sum", "fixed_reference": "text"},
    {"reduction": "none"},
    {"precision": "exact-order"},
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize("scale", ["number", "tensor"])
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(
    likelihood, lists, scale: str, kernel: str
) -> None:
    options = RankOptions(bins=32, chunk_size=16, kernel=kernel, **lists, **likelihood)
    with fake_cuda() as copies:
        v, t = (torch.empty(32, 8, device="cuda") for _ in range(2))
        features = Features.of(v, t, 10.0 if scale == "number" else torch.empty((), device="cuda"))
        weights = torch.empty(3, dtype=torch.float64, device="cuda")
        per_anchor = options.reduction == "none"
        terms = weighted_terms(features, options, weights, contrastive=options.worth == "exp")
        assert all(x.device == v.device for x in terms)
        assert all(x.shape == ((32,) if per_anchor else ()) for x in terms)
        # In a fake mode an operator runs its shape function: what it does itself is called by hand.
        wanted = [True, True, False, False, True]
        shuffles = torch.stack([torch.randperm(32, device="cuda")] * 4) if options.ties == "random" else None
        call = operator._Call(
            *features.inputs,
            weights,
            shuffles,
            None,
            None,
            0,
            [options.worth == "exp", True, True],
            wanted,
            options.encoded,
        )
        of_terms, sums, _ = operator._run(call, *call.unpacked([torch.empty_like(x) for x in terms]), wanted)
        assert all(x.shape == (32,) for x in of_terms if x is not None)
        assert [x.numel() for x in sums] == [256, 256, 0, 0, 1]
        assert copies.found == []


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("lists", [{}, {"diagonal": False}, {"ties": "random"}, {"reduction": "none"}])
def test_batch_lists_on_an_accelerator_never_wait_for_it_nor_copy_to_it(likelihood, lists) -> None:
    options = RankOptions(lists="batch", **lists, **likelihood)
    with fake_cuda() as copies:
        v, t = (torch.empty(8, 4, device="cuda") for _ in range(2))
        weights = torch.empty(3, dtype=torch.float64, device="cuda")
        terms = weighted_terms(Features.of(v, t, 10.0), options, weights)
        assert all(x.device == v.device for x in terms)
        assert copies.found == []


def test_a_wait_and_a_copy_would_be_seen() -> None:
    with fake_cuda() as copies:
        x = torch.empty(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            bool(x[0] > 0)
        torch.ops.aten._to_copy.default(torch.empty(3), device=torch.device("cuda"))
        assert copies.found == ["aten._to_copy.default"]


@pytest.mark.parametrize("lists", ["row", "batch"])
def test_weights_are_read_when_the_terms_are_computed_and_a_graph_follows_them(lists: str) -> None:
    """In place: as a captured graph, which reads what lies at the address, follows them too."""
    torch._dynamo.reset()
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    options, weights = RankOptions(lists=lists), torch.ones(3, dtype=torch.float64)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(weights: Tensor) -> tuple[Tensor, ...]:
        return weighted_terms(Features.of(v, t, s), options, weights)[1:]

    ones = [x.detach() for x in compiled(weights)]
    weights.copy_(torch.tensor([1.0, 0.5, 3.0]))
    for value, one, weight in zip(compiled(weights), ones, (0.5, 3.0), strict=True):
        torch.testing.assert_close(value.detach(), weight * one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("name", ["image", "text"])
def test_fixed_reference_alone_has_no_gradient_and_can_be_differentiated_again(
    name: str, memory_budget: int | None
) -> None:
    """Its rankings are fixed, so what flows to it are its similarities as scores, and those may be absent."""
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    only = (t if name == "text" else v).requires_grad_()
    other = (v if name == "text" else t).detach()
    pair = (other, only) if name == "text" else (only, other)
    loss = RankConsistency(fixed_reference=name, memory_budget=memory_budget)
    entries = loss(*pair, s.detach(), output_dict=True)
    for term in entries.values():
        first, second = (
            torch.autograd.grad(1.7 * term, only, create_graph=again, retain_graph=True, allow_unused=True)[0]
            for again in (False, True)
        )
        torch.testing.assert_close(second.detach(), first, rtol=1e-4, atol=1e-6)
