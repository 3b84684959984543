from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from batches import VECTORS, Batch, batches, gradients, random_batch, relative_error, vector_batch
from interpreter import few_examples, interpreted, needs_triton
from memory import LargestTensor, saved_bytes
from rankloss import Gather, RankConsistency, dense, likelihood, operator, plackett_luce_nll, reference
from rankloss.batch import Batch as Features
from rankloss.functional import cross_modal, in_modal
from rankloss.options import RankOptions

TERMS: dict[str, tuple[Callable[..., Tensor], Callable[..., float]]] = {
    "cross_modal": (cross_modal, reference.cross_modal),
    "in_modal": (in_modal, reference.in_modal),
}
terms = pytest.mark.parametrize("term", TERMS)

likelihoods = st.fixed_dictionaries(
    {
        "worth": st.sampled_from(["exp", "shifted"]),
        "discount": st.sampled_from([None, "log"]),
        "top_k": st.none() | st.integers(1, 12),
    }
)
# What the lists hold and which of them are trained; the default stands first, hypothesis shrinks to it.
choices_of_lists = st.fixed_dictionaries(
    {
        "diagonal": st.booleans().map(lambda x: not x),
        "fixed_reference": st.sampled_from([None, "image", "text"]),
    }
)
reductions = st.sampled_from(["mean", "sum", "none"])


def upstream_for(value: Tensor) -> Tensor:
    """A gradient from above that is neither 1 nor the same for every entry."""
    return torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype).view_as(value)


def dense_row_lists(term: str, v: Tensor, t: Tensor, s: Tensor, reduction: str, likelihood) -> Tensor:
    options = RankOptions(reduction=reduction, **likelihood)
    values = dense.row_lists_nll(Features.of(v, t, s), term, options)
    return {
        "mean": values.mean(),
        "sum": values.sum(),
        "none": values,
    }[reduction]


# --- oracles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerances"), [(torch.float64, (1e-10, 1e-10)), (torch.float32, (1e-5, 1e-4))]
)
@pytest.mark.parametrize("key", VECTORS)
def test_row_lists_match_the_vectors_in_value_and_gradient(key: str, dtype, tolerances, chunk_size) -> None:
    assert_match_the_vectors(key, dtype, tolerances, chunk_size=chunk_size)


@needs_triton
@pytest.mark.parametrize("key", [key for key, case in VECTORS.items() if case["N"] < 10])
def test_row_lists_of_the_fused_kernels_match_the_vectors(key: str) -> None:
    with interpreted():
        assert_match_the_vectors(key, torch.float32, (1e-5, 1e-4), chunk_size=4, kernel="triton")


def assert_match_the_vectors(
    key: str, dtype: torch.dtype, tolerances: tuple[float, float], **options
) -> None:
    case, (value_tolerance, gradient_tolerance) = VECTORS[key], tolerances
    v, t, _ = vector_batch(case).leaves(dtype)
    log_scale = torch.tensor(math.log(case["scale"]), dtype=dtype, requires_grad=True)
    loss = RankConsistency(**options)(v, t, log_scale.exp(), output_dict=True)
    for term in TERMS:
        assert relative_error(loss[f"{term}_loss"], case["row_mean"][term]) < value_tolerance
    expected = case["row_mean_gradient"]
    total = sum(loss.values())
    upstream = 2.5
    dv, dt, ds = (g / upstream for g in gradients(total, (v, t, log_scale), upstream))
    assert relative_error(total, expected["value"]) < value_tolerance
    for gradient, name in (
        (dv.norm(), "norm_V"),
        (dt.norm(), "norm_T"),
        (ds, "logit_scale"),
        (dv[0, 0], "V00"),
    ):
        assert relative_error(gradient, expected[name]) < gradient_tolerance, name
    assert relative_error(dt[-1, -1], expected["T_last"]) < gradient_tolerance
    for gradient, name in ((dv, "V"), (dt, "T")):
        if name in expected:
            assert relative_error(gradient, expected[name]) < gradient_tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("key", [k for k, case in VECTORS.items() if "batch_list_sum" in case])
def test_batch_lists_match_the_vectors(key: str, dtype: torch.dtype, tolerance: float) -> None:
    case = VECTORS[key]
    v, t, s = vector_batch(case).leaves(dtype)
    sums = case["batch_list_sum"]
    for term, expected in (
        ("cross_modal", sums["cross_modal"]),
        ("in_modal", (sums["in_modal I|X"] + sums["in_modal X|I"]) / 2),
    ):
        value = TERMS[term][0](v, t, s, lists="batch", reduction="sum")
        assert relative_error(value, expected) < tolerance
    value = cross_modal(v, t, s, lists="batch", reduction="sum", worth="shifted")
    assert relative_error(value, case["batch_list_sum_shifted_worth"]["cross_modal"]) < tolerance


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@settings(max_examples=40)
@given(batch=batches(max_n=7), likelihood=likelihoods, reduction=reductions, choices=choices_of_lists)
def test_matches_the_literal_numpy_reference(
    term, lists, batch: Batch, likelihood, reduction, choices
) -> None:
    ours, theirs = TERMS[term]
    options = {"lists": lists, "reduction": reduction, **likelihood, **choices}
    actual = ours(batch.image, batch.text, batch.scale, **options)
    expected = theirs(batch.image, batch.text, batch.scale, **options)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@settings(max_examples=20)
@given(batch=batches(max_n=7, positive=True))
def test_identity_worth_matches_the_reference_where_every_cosine_is_positive(
    term, lists, batch: Batch
) -> None:
    ours, theirs = TERMS[term]
    actual = ours(batch.image, batch.text, batch.scale, worth="identity", lists=lists)
    expected = theirs(batch.image, batch.text, batch.scale, worth="identity", lists=lists)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)


# --- invariants -------------------------------------------------------------------------------------------


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@given(batch=batches(), likelihood=likelihoods, random=st.randoms(use_true_random=False))
def test_permuting_the_pairs_of_a_batch_changes_nothing_ties_included(
    term, lists, batch: Batch, likelihood, random
) -> None:
    loss = TERMS[term][0]
    order = list(range(len(batch.image)))
    random.shuffle(order)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        v, t = batch.image.to(dtype), batch.text.to(dtype)
        expected = loss(v, t, batch.scale, lists=lists, **likelihood)
        actual = loss(v[order], t[order], batch.scale, lists=lists, **likelihood)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@given(batch=batches(), likelihood=likelihoods)
def test_swapping_the_modalities_changes_nothing(term, lists, batch: Batch, likelihood) -> None:
    loss = TERMS[term][0]
    expected = loss(batch.image, batch.text, batch.scale, lists=lists, **likelihood)
    actual = loss(batch.text, batch.image, batch.scale, lists=lists, **likelihood)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@given(batch=batches(ties=False), likelihood=likelihoods, seed=st.integers(0, 2**32 - 1))
def test_rotating_both_embeddings_by_one_orthogonal_matrix_changes_nothing(
    term, lists, batch: Batch, likelihood, seed
) -> None:
    d = batch.image.shape[1]
    rotation, _ = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((d, d))))
    loss = TERMS[term][0]
    expected = loss(batch.image, batch.text, batch.scale, lists=lists, **likelihood)
    actual = loss(batch.image @ rotation, batch.text @ rotation, batch.scale, lists=lists, **likelihood)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(batch=batches())
def test_batch_list_cross_modal_is_the_same_in_both_directions(batch: Batch) -> None:
    s = batch.scale * (batch.image[:, None] * batch.text).sum(-1)
    there = plackett_luce_nll(s.flatten(), s.T.flatten())
    back = plackett_luce_nll(s.T.flatten(), s.flatten())
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)
    value = cross_modal(batch.image, batch.text, batch.scale, lists="batch", reduction="sum")
    torch.testing.assert_close(value, there, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [5, 17, 64])
@pytest.mark.parametrize("duplicates", [0, 2])
def test_structural_ties_of_a_batch_list_are_exact_in_float32(n: int, duplicates: int) -> None:
    # X_ij = X_ji and N equal diagonal entries: a rounding apart, they would cost about log 2 a pair.
    batch = random_batch(n, n, 13, 1.0, duplicates=duplicates)
    v, t = batch.image.float(), batch.text.float()
    actual = in_modal(v, t, lists="batch")
    expected = reference.in_modal(batch.image.numpy(), batch.text.numpy(), lists="batch")
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("n", [7, 17, 65])
@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
def test_duplicates_tie_exactly_whatever_the_products_rounding(
    n: int, chunk_size: int | None, kernel: str
) -> None:
    # A matrix product rounds the columns of equal items differently where they fall on a kernel's edge.
    if kernel == "triton" and (n > 17 or chunk_size == 1):
        pytest.skip("slow in Triton's interpreter")
    batch = random_batch(n, n, 5, 10.0, duplicates=3)
    v, t, s = batch.leaves(torch.float32)
    for ours, theirs in TERMS.values():
        expected = theirs(batch.image.numpy(), batch.text.numpy(), batch.scale)
        with interpreted() if kernel == "triton" else contextlib.nullcontext():
            value = ours(v, t, s, chunk_size=chunk_size, kernel=kernel)
        assert relative_error(value, expected) < 1e-5


@given(batch=batches(), choices=choices_of_lists)
def test_reductions_are_one_value_in_three_normalisations(batch: Batch, choices) -> None:
    n = len(batch.image)
    for lists in ("row", "batch"):
        for loss, _ in TERMS.values():
            none, sum_, mean = (
                loss(batch.image, batch.text, batch.scale, lists=lists, reduction=r, **choices)
                for r in ("none", "sum", "mean")
            )
            assert none.shape == (n,)
            torch.testing.assert_close(none.sum(), sum_, rtol=1e-12, atol=0)
            items = n if choices["diagonal"] else n - 1
            torch.testing.assert_close(sum_ / (n * items), mean, rtol=1e-12, atol=0)


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@given(batch=batches(), likelihood=likelihoods, diagonal=st.booleans())
def test_the_two_fixed_references_are_the_two_directions(
    term, lists, batch: Batch, likelihood, diagonal
) -> None:
    v, t, s = batch.leaves()
    loss, options = TERMS[term][0], {"lists": lists, "diagonal": diagonal, **likelihood}
    both, image, text = (loss(v, t, s, fixed_reference=r, **options) for r in (None, "image", "text"))
    torch.testing.assert_close((image + text) / 2, both, rtol=1e-10, atol=1e-12)
    swapped = loss(t, v, s, fixed_reference="image", **options)
    torch.testing.assert_close(swapped, text, rtol=1e-10, atol=1e-12)
    if term == "in_modal":  # the lists of the images among themselves teach the texts nothing
        assert not torch.autograd.grad(text, t, allow_unused=True, materialize_grads=True)[0].any()


def test_without_the_diagonal_a_pair_of_its_own_says_nothing() -> None:
    # Two pairs: what is left of every list is one item, and one item has one order.
    batch = random_batch(0, 2, 3, 10.0)
    for loss, _ in TERMS.values():
        assert loss(batch.image, batch.text, batch.scale, diagonal=False) == 0
        assert loss(batch.image, batch.text, batch.scale) > 0


# --- streaming --------------------------------------------------------------------------------------------


streams = st.fixed_dictionaries(
    {
        "reduction": reductions,
        "chunk_size": st.none() | st.integers(1, 14),
        "memory_budget": st.sampled_from([None, 0]),
    }
)


@terms
@given(batch=batches(), likelihood=likelihoods, stream=streams, choices=choices_of_lists)
def test_streaming_equals_plain_in_value_and_in_every_gradient(
    term, batch: Batch, likelihood, stream, choices
) -> None:
    v, t, s = batch.leaves()
    likelihood = likelihood | choices
    plain = dense_row_lists(term, v, t, s, stream["reduction"], likelihood)
    streaming = TERMS[term][0](v, t, s, **stream, **likelihood)
    torch.testing.assert_close(streaming, plain, rtol=1e-10, atol=1e-10)
    inputs = (v, t, s) if likelihood["worth"] == "exp" else (v, t)
    upstream = upstream_for(plain)
    # A fixed modality has no part in the other's in-modal lists: autograd's None is a zero here.
    expected_gradients = torch.autograd.grad(
        plain, inputs, upstream, allow_unused=True, materialize_grads=True
    )
    for actual, expected in zip(gradients(streaming, inputs, upstream), expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@needs_triton
@terms
@few_examples(4)
@given(
    batch=batches(max_n=5),
    likelihood=likelihoods.map(lambda x: x | {"worth": "exp"}),
    stream=streams,
    choices=choices_of_lists,
)
def test_streaming_through_the_fused_kernels_equals_plain_in_float64(
    term, batch: Batch, likelihood, stream, choices
) -> None:
    inputs = batch.leaves(torch.float32)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    likelihood = likelihood | choices
    plain = dense_row_lists(term, *exact, stream["reduction"], likelihood)
    with interpreted():
        streaming = TERMS[term][0](*inputs, kernel="triton", **stream, **likelihood)
    upstream = upstream_for(plain)
    wanted = torch.autograd.grad(plain, exact, upstream, allow_unused=True, materialize_grads=True)
    with interpreted():  # reduction="none" computes its gradient here
        found = gradients(streaming, inputs, upstream)
    assert (streaming.double() - plain).norm() <= 1e-5 * plain.norm().clamp_min(1.0)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm().clamp_min(1.0)


@terms
def test_random_ties_stream_as_they_compute_plainly_and_break_ties_one_way_per_call(term) -> None:
    batch = random_batch(0, 9, 4, 10.0, duplicates=3)
    for reduction in ("mean", "none"):
        results = []
        for chunk_size in (1, 4, None):
            torch.manual_seed(3)
            v, t, s = batch.leaves()
            value = TERMS[term][0](v, t, s, ties="random", reduction=reduction, chunk_size=chunk_size)
            results.append([value, *gradients(value, (v, t, s), upstream_for(value))])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    shared = TERMS[term][0](*batch.leaves())
    assert abs(results[0][0].mean() / 9 - shared) > 1e-3


@pytest.mark.parametrize("lists", ["row", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "likelihood",
    [
        {},
        {"worth": "shifted", "discount": "log", "top_k": 3},
        {"worth": "shifted", "diagonal": False, "fixed_reference": "text"},
    ],
    ids=["exp", "all", "others"],
)
def test_first_and_second_derivatives_are_right(lists: str, reduction: str, likelihood) -> None:
    criterion = RankConsistency(
        cross_modal=0.7, in_modal=1.3, lists=lists, reduction=reduction, chunk_size=2, **likelihood
    )
    v, t, s = random_batch(1, 5, 3, 2.0).leaves()
    inputs = (v, t, s) if not likelihood else (v, t)

    def f(v: Tensor, t: Tensor, s: Tensor | float = 1.0) -> Tensor:
        return criterion(v, t, s)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    batch = random_batch(2, 6, 4, 10.0)
    full = gradients(RankConsistency()(*(leaves := batch.leaves())), leaves, 1.0)
    for locked in range(3):
        inputs = [x.detach() if i == locked else x.detach().requires_grad_() for i, x in enumerate(leaves)]
        RankConsistency()(*inputs).backward()
        for i, (x, expected) in enumerate(zip(inputs, full, strict=True)):
            assert (x.grad is None) if i == locked else torch.equal(x.grad, expected)


def saved_bytes_of_batch(n: int, chunk_size: int) -> int:
    v, t, s = random_batch(0, n, 8, 10.0).leaves(torch.float32)
    return saved_bytes(lambda: RankConsistency(chunk_size=chunk_size)(v, t, s))


def test_what_forward_keeps_for_backward_grows_linearly_in_n() -> None:
    small, large = saved_bytes_of_batch(64, 8), saved_bytes_of_batch(256, 8)
    assert small > 0
    assert large <= 4.05 * small
    assert large < 256 * 256 * 4  # less than one N×N matrix


@pytest.mark.parametrize("method", ["sort", "bin"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_as_large_as_n_by_n_is_ever_made(reduction: str, method: str, monkeypatch) -> None:
    original, largest = operator.stream, LargestTensor()

    def watched(*arguments, **keywords):  # from the inside: a mode does not see into an operator
        with largest:
            return original(*arguments, **keywords)

    monkeypatch.setattr(operator, "stream", watched)
    n, d, chunk = 64, 8, 4
    v, t, s = random_batch(0, n, d, 10.0).leaves(torch.float32)
    options = {"reduction": reduction, "method": method, "bins": 16}
    value = RankConsistency(chunk_size=chunk, memory_budget=0, **options)(v, t, s)
    value.backward(upstream_for(value))
    assert n * chunk <= largest.elements <= 2 * n * max(chunk, d)
    largest.elements = 0
    RankConsistency(chunk_size=n, memory_budget=0, **options)(v, t, s).sum().backward()
    assert largest.elements >= n * n  # the measurement sees such a tensor where there is one


# --- precision --------------------------------------------------------------------------------------------


def clustered(n: int, d: int, clusters: int, spread: float, duplicates: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(clusters)
    centres = torch.randn(clusters, d, generator=generator)
    v, t = (
        F.normalize(
            centres[torch.arange(n) % clusters] + spread * torch.randn(n, d, generator=generator), dim=-1
        )
        for _ in range(2)
    )
    if duplicates:
        v[-duplicates:], t[-duplicates:] = v[:duplicates], t[:duplicates]
    return v, t


@pytest.mark.parametrize("s", [1.0, 1 / 0.07, 100.0])
@pytest.mark.parametrize(
    ("clusters", "spread", "duplicates"), [(1, 0.3, 0), (16, 0.2, 0), (128, 1.0, 0), (16, 0.2, 20)]
)
def test_float32_is_right_at_every_scale_for_clusters_and_duplicates(s, clusters, spread, duplicates) -> None:
    v, t = clustered(128, 32, clusters, spread, duplicates)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = Batch(v.double(), t.double(), s).leaves(dtype)
        value = RankConsistency(chunk_size=48)(*inputs)
        results.append([value, *gradients(value, inputs, 1.7)])
    (value, *actual), (expected_value, *expected) = results
    assert relative_error(value, expected_value) < 1e-5
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("s", [1 / 0.07, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_lose_nothing_but_their_own_rounding(dtype: torch.dtype, s: float) -> None:
    v, t = (x.to(dtype) for x in clustered(256, 64, 32, 1.0, 0))
    inputs = tuple(x.clone().requires_grad_() for x in (v, t, torch.tensor(s)))
    exact = Batch(v.double(), t.double(), s).leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = RankConsistency()(*inputs)
    assert value.dtype == torch.float32
    expected = RankConsistency()(*exact)
    assert relative_error(value, expected) < 1e-5
    for actual, wanted in zip(gradients(value, inputs, 1.0), gradients(expected, exact, 1.0), strict=True):
        assert relative_error(actual, wanted) < 0.005


@pytest.mark.parametrize("options", [{}, {"lists": "batch"}, {"reduction": "none"}])
@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_the_value_and_gradient_are_those_without_it(options, backward_too, compiled) -> None:
    criterion, results = RankConsistency(**options), []
    for enabled in (False, True):
        if compiled:
            torch._dynamo.reset()
            criterion = torch.compile(RankConsistency(**options), backend="aot_eager", fullgraph=True)
        inputs = random_batch(5, 32, 16, 100.0).leaves(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = criterion(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and backward_too):
            results.append([value, *gradients(value, inputs, upstream_for(value))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lists", ["row", "batch"])
def test_second_derivatives_under_autocast_are_those_without_it(lists: str) -> None:
    results = []
    for enabled in (False, True):
        inputs = random_batch(5, 16, 16, 100.0).leaves(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = RankConsistency(lists=lists)(*inputs)
            first = torch.autograd.grad(value, inputs, create_graph=True)
            results.append([*first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"method": "bin"}, {"memory_budget": 0}, {"discount": "log"}, {"lists": "batch"}]
)
@pytest.mark.filterwarnings("ignore::rankloss.InputWarning")  # some rows are zero
def test_flushed_subnormals_change_nothing(options) -> None:
    generator = torch.Generator().manual_seed(0)

    def sparse() -> Tensor:  # similarities of exactly 0, and rows of zeros
        kept = torch.rand(64, 48, generator=generator) < 0.08
        return F.normalize(torch.randn(64, 48, generator=generator) * kept, dim=-1)

    v, t = sparse(), sparse()
    v[3] = 0
    results = []
    for flush in (False, True):
        inputs = v.clone().requires_grad_(), t.clone().requires_grad_()
        assert torch.set_flush_denormal(flush)
        try:
            value = RankConsistency(**options)(*inputs, 100.0)
            results.append([value, *gradients(value, inputs, 1.0)])
        finally:
            torch.set_flush_denormal(False)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_weights_far_below_one_lose_no_gradient_beside_worths_far_apart() -> None:
    # Float32 worths reach from e^-70 to e^70 here, and 1e-12 times 1e-30 is no float32.
    v, t, s = random_batch(0, 32, 4, 69.0).leaves(torch.float32)
    plain, small = (
        gradients(RankConsistency(cross_modal=w, in_modal=w)(v, t, s), (v, t, s), 1.0) for w in (1.0, 1e-12)
    )
    for a, b in zip(small, plain, strict=True):
        assert relative_error(a * 1e12, b) < 1e-6


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", ["row", "batch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"worth": "shifted"},
        {"worth": "identity"},
        {"discount": "log", "top_k": 2},
        {"diagonal": False},
        {"reduction": "sum"},
        {"ties": "random"},
        {"method": "bin"},
        {"memory_budget": 0},
    ],
)
def test_nan_or_infinity_in_a_feature_gives_nan_in_every_term_and_gradient(
    lists, bad: float, where: int, options
) -> None:
    if lists == "batch" and "method" in options:
        return
    for loss, _ in TERMS.values():
        batch = random_batch(0, 4, 3, 10.0, positive=True)
        inputs = batch.leaves(torch.float32)
        inputs[where].data[1, 2] = bad
        value = loss(*inputs, lists=lists, **options)
        assert value.isnan()
        inputs = inputs[:2] if "worth" in options else inputs  # the others do not depend on the scale
        for gradient in gradients(value, inputs, 1.0):
            assert gradient.isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lists": "column"}, r"lists must be one of 'row', 'batch'; got 'column'"),
        ({"reduction": "avg"}, r"reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
        ({"chunk_size": 0}, r"chunk_size must be an integer of at least 1; got 0"),
        ({"chunk_size": 2.0}, r"chunk_size must be an integer of at least 1; got 2.0"),
        ({"worth": "power"}, r"worth must be one of .*; got 'power'"),
        ({"ties": "none"}, r"ties must be one of .*; got 'none'"),
        ({"discount": "exp"}, r"discount must be one of .*; got 'exp'"),
        ({"diagonal": "no"}, r"diagonal must be one of True, False; got 'no'"),
        ({"fixed_reference": "both"}, r"fixed_reference must be one of None, 'image', 'text'; got 'both'"),
        ({"diagonal": False, "ties": "random"}, r"diagonal=False .* needs ties='shared'"),
        ({"top_k": -1}, r"top_k must be an integer of at least 1; got -1"),
        ({"cross_modal": -0.5}, r"cross_modal must be finite and >= 0; got -0.5"),
        ({"in_modal": math.nan}, r"in_modal must be finite and >= 0; got nan"),
        ({"lists": "batch", "gather": Gather()}, r"lists='batch' .* cannot have local_loss=True"),
        ({"gather": "yes"}, r"gather must be None \(the default process group\), .*; got 'yes'"),
    ],
)
def test_options_are_checked_when_the_module_is_made(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankConsistency(**options)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="temperature"):
        RankConsistency(temperature=0.07)


@pytest.mark.parametrize(
    ("image", "text", "scale", "message"),
    [
        (
            torch.ones(3, 4),
            torch.ones(2, 4),
            1.0,
            r"image_features and text_features .*\(3, 4\) and \(2, 4\)",
        ),
        (torch.ones(3, 4), torch.ones(3, 5), 1.0, r"\(3, 4\) and \(3, 5\)"),
        (torch.ones(1, 4), torch.ones(1, 4), 1.0, r"at least two pairs; got shape \(1, 4\)"),
        (torch.ones(12), torch.ones(12), 1.0, r"image_features must have shape \[N, D\]; got \(12,\)"),
        (
            torch.ones(3, 4),
            torch.ones(3, 4, 1),
            1.0,
            r"text_features must have shape \[N, D\]; got \(3, 4, 1\)",
        ),
        (
            torch.ones(3, 4).long(),
            torch.ones(3, 4),
            1.0,
            "image_features must be floating point; got torch.int64",
        ),
        (
            torch.ones(3, 4),
            torch.ones(3, 4).int(),
            1.0,
            "text_features must be floating point; got torch.int32",
        ),
        (torch.eye(3), torch.eye(3), 0.0, r"logit_scale must be positive .*; got 0"),
        (torch.eye(3), torch.eye(3), torch.tensor(-2.5), r"logit_scale must be positive .*; got -2.5"),
        (torch.eye(3), torch.eye(3), torch.ones(2), r"logit_scale must be one number; got shape \(2,\)"),
    ],
)
def test_bad_features_are_named_and_shown(image, text, scale, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankConsistency()(image, text, scale)


def test_identity_worth_refuses_a_cosine_that_is_not_positive() -> None:
    v = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
    with pytest.raises(ValueError, match=r"worth='identity'.* the smallest is -0.6"):
        RankConsistency(worth="identity")(v, torch.eye(2))


@pytest.mark.parametrize("worth", ["identity", "shifted"])
def test_where_no_look_is_free_a_worth_that_is_not_positive_gives_nan(worth: str, monkeypatch) -> None:
    monkeypatch.setattr(likelihood, "may_look_at", lambda x: False)
    v, t = torch.eye(3, requires_grad=True), torch.eye(3).requires_grad_()
    with torch.no_grad():
        t[0] = -t[0]  # a cosine of −1
    for options in ({}, {"lists": "batch"}, {"method": "bin"}):
        value = RankConsistency(worth=worth, **options)(v, t)
        assert value.isnan()
        for gradient in gradients(value, (v, t), 1.0):
            assert gradient.isnan().any()


@terms
@settings(max_examples=20)
@given(
    batch=batches(max_n=6),
    # No two of their products are equal but for rounding, which would leave the order open.
    image_norms=st.permutations([0.3, 0.7, 1.1, 1.7, 2.3, 3.1]),
    text_norms=st.permutations([0.5, 1.3, 1.9, 2.9, 3.7, 4.1]),
    lists=st.sampled_from(["row", "batch"]),
    likelihood=likelihoods,
)
def test_features_that_are_not_unit_norm_are_computed_as_they_are(
    term, batch, image_norms, text_norms, lists, likelihood
) -> None:
    if likelihood["worth"] == "shifted":
        likelihood = {**likelihood, "worth": "exp"}  # no cosines any more
    n = len(batch.image)
    v = batch.image * torch.tensor(image_norms[:n], dtype=torch.float64)[:, None]
    t = batch.text * torch.tensor(text_norms[:n], dtype=torch.float64)[:, None]
    ours, theirs = TERMS[term]
    actual = ours(v, t, batch.scale, lists=lists, **likelihood)
    expected = theirs(v, t, batch.scale, lists=lists, **likelihood)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use
@pytest.mark.parametrize("lists", ["row", "batch"])
def test_forward_mode_differentiation_is_refused(lists: str) -> None:
    v, t, s = (x.detach() for x in random_batch(0, 6, 4, 10.0).leaves())
    criterion = RankConsistency(lists=lists)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: criterion(v, t, s), (v,), (torch.ones_like(v),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        criterion(v, t, forward_ad.make_dual(s, torch.ones_like(s)))


def test_logit_scale_may_be_a_tensor_of_one_element() -> None:
    v, t, s = random_batch(0, 4, 3, 10.0).leaves()
    for scale in (s, s.reshape(1), s.item()):
        assert torch.equal(RankConsistency()(v, t, scale), RankConsistency()(v, t, s))
