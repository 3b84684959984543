"""Lists that are ranked by a teacher's features."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from batches import Batch, batches, gradients, random_batch, relative_error, unit_rows
from fake_cuda import fake_cuda
from memory import LargestTensor, saved_bytes
from process_pool import Pool
from rankloss import (
    Gather,
    InputWarning,
    RankClipLoss,
    RankConsistency,
    dense,
    operator,
    plackett_luce_nll,
    reference,
)
from rankloss.batch import Batch as Features
from rankloss.functional import cross_modal, in_modal, weighted_terms
from rankloss.options import RankOptions

TERMS = {"cross_modal": (cross_modal, reference.cross_modal), "in_modal": (in_modal, reference.in_modal)}
terms = pytest.mark.parametrize("term", TERMS)
IMAGE, TEXT = "reference_image_features", "reference_text_features"

likelihoods = st.sampled_from(
    [
        {},
        {"discount": "log", "top_k": 3},
        {"top_k": 1},
        {"worth": "shifted", "top_k": 2},
        {"model": "top_one"},
        {"model": "top_one", "reference_scale": 6.0},
    ]
)
lists_options = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "diagonal": st.sampled_from([True, False]),
    }
)


def teacher_of(n: int, d: int = 5, *, seed: int = 7, duplicates: int = 0) -> dict[str, Tensor]:
    """A teacher's features of another dimension; the last ``duplicates`` rows repeat the first."""
    rng = np.random.default_rng(seed)
    image, text = unit_rows(rng, n, d), unit_rows(rng, n, d)
    for features in (image, text):
        features[n - duplicates :] = features[:duplicates]
    return {IMAGE: torch.from_numpy(image), TEXT: torch.from_numpy(text)}


def as_numpy(teacher: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.double().numpy() for name, x in teacher.items()}


def given_to(term: str, given_names: list[str], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cross-modal term takes both modalities, the in-modal one those that are drawn."""
    names = [IMAGE, TEXT] if term == "cross_modal" else given_names
    return {name: teacher[name] for name in names}


modalities = st.sampled_from([[IMAGE, TEXT], [IMAGE], [TEXT]])


# --- oracles ----------------------------------------------------------------------------------------------


@terms
@pytest.mark.parametrize("lists", ["row", "batch"])
@settings(max_examples=40)
@given(
    batch=batches(max_n=7),
    seed=st.integers(0, 99),
    duplicates=st.integers(0, 1),
    names=modalities,
    likelihood=likelihoods,
    options=lists_options,
)
def test_matches_the_literal_numpy_reference(
    term, lists, batch: Batch, seed, duplicates, names, likelihood, options
) -> None:
    ours, theirs = TERMS[term]
    teacher = given_to(term, names, teacher_of(len(batch.image), seed=seed, duplicates=duplicates))
    options = {"lists": lists, **likelihood, **options}
    inputs = (batch.image, batch.text, batch.scale)
    actual = ours(*inputs, **teacher, **options)
    expected = theirs(*(x.numpy() for x in inputs[:2]), batch.scale, **as_numpy(teacher), **options)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_the_terms_written_out() -> None:
    v, t, s = random_batch(0, 5, 3, 4.0).leaves()
    teacher = teacher_of(5)
    f, g = teacher[IMAGE], teacher[TEXT]
    pairs = {
        "cross_modal": ((v @ t.T, f @ g.T), (t @ v.T, g @ f.T)),
        "in_modal": ((v @ v.T, f @ f.T), (t @ t.T, g @ g.T)),
    }
    for term, sides in pairs.items():
        expected = 0.0
        for cosines, by in sides:
            for x, y in zip(s * cosines, by, strict=True):
                order = y.argsort(descending=True)
                expected = expected + sum(x[order[p:]].logsumexp(0) - x[order[p]] for p in range(5)) / 5
        expected = expected / 10
        actual = TERMS[term][0](v, t, s, **teacher)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        for a, b in zip(gradients(actual, (v, t, s), 1.3), gradients(expected, (v, t, s), 1.3), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def plain(term: str, inputs: tuple[Tensor, ...], teacher: dict[str, Tensor], options: RankOptions) -> Tensor:
    """By autograd."""
    names = {IMAGE: "reference_image", TEXT: "reference_text"}
    features = Features.of(*inputs, **{names[name]: x for name, x in teacher.items()})
    values = dense.row_lists_nll(features, term, options)
    return {"mean": values.mean(), "sum": values.sum(), "none": values}[options.reduction]


@terms
@given(
    batch=batches(),
    seed=st.integers(0, 99),
    names=modalities,
    likelihood=likelihoods | st.just({"method": "bin", "bins": 7}),
    options=lists_options,
    chunk_size=st.none() | st.integers(1, 14),
    budget=st.sampled_from([None, 0]),
)
def test_streaming_equals_plain_in_value_and_in_every_gradient(
    term, batch: Batch, seed, names, likelihood, options, chunk_size, budget
) -> None:
    inputs = batch.leaves()
    teacher = given_to(term, names, teacher_of(len(batch.image), seed=seed, duplicates=1))
    options = {**likelihood, **options}
    value = TERMS[term][0](*inputs, **teacher, **options, chunk_size=chunk_size, memory_budget=budget)
    expected = plain(term, inputs, teacher, RankOptions(**options))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype).view_as(value)
    inputs = inputs if likelihood.get("worth", "exp") == "exp" else inputs[:2]
    for a, b in zip(gradients(value, inputs, upstream), gradients(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lists", ["row", "batch"])
@pytest.mark.parametrize(
    "likelihood",
    # Finite differences would move the reference with the scale of the scores: it has its own here.
    [{}, {"top_k": 2, "diagonal": False}, {"model": "top_one", "reference_scale": 6.0}],
)
def test_first_and_second_derivatives_are_right(lists: str, likelihood) -> None:
    criterion = RankConsistency(cross_modal=0.7, in_modal=1.3, lists=lists, chunk_size=2, **likelihood)
    teacher = teacher_of(5)

    def f(v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return criterion(v, t, s, **teacher)

    inputs = random_batch(1, 5, 3, 2.0).leaves()
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_the_students_own_features_as_a_teacher_rank_each_matrix_by_itself() -> None:
    batch = random_batch(0, 8, 4, 10.0, duplicates=2)
    own = {IMAGE: batch.image, TEXT: batch.text}
    s = batch.scale * (batch.image[:, None] * batch.text).sum(-1)
    nll = (plackett_luce_nll(s, s) + plackett_luce_nll(s.T, s.T)).mean() / 16
    torch.testing.assert_close(cross_modal(batch.image, batch.text, batch.scale, **own), nll)


# --- what a teacher may be --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 17, 65])
@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_equal_rows_of_the_teacher_tie_exactly_whatever_the_products_rounding(n: int, chunk_size) -> None:
    batch, teacher = random_batch(n, n, 5, 10.0), teacher_of(n, 13, duplicates=3)
    v, t, s = batch.leaves(torch.float32)
    in_float32 = {name: x.float() for name, x in teacher.items()}
    for ours, theirs in TERMS.values():
        expected = theirs(batch.image.numpy(), batch.text.numpy(), batch.scale, **as_numpy(teacher))
        assert relative_error(ours(v, t, s, **in_float32, chunk_size=chunk_size), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_teacher_of_another_dtype_is_compared_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    batch, teacher = random_batch(0, 32, 8, 20.0), teacher_of(32, 16)
    given_dtype = {name: x.to(dtype).requires_grad_() for name, x in teacher.items()}
    results = []
    for features in (given_dtype, {name: x.float() for name, x in given_dtype.items()}):
        inputs = batch.leaves(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = RankConsistency()(*inputs, **features)
        assert value.dtype == torch.float32
        results.append([value, *gradients(value, inputs, -0.6)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    value = RankConsistency()(*batch.leaves(), **given_dtype)
    assert torch.autograd.grad(value, [*given_dtype.values()], allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", [IMAGE, TEXT])
@pytest.mark.parametrize(
    "options", [{}, {"lists": "batch"}, {"model": "top_one"}, {"method": "bin"}, {"top_k": 1}]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_or_infinity_in_a_teachers_feature_gives_nan(name: str, options, bad: float) -> None:
    teacher = teacher_of(6)
    teacher[name][2, 1] = bad
    inputs = random_batch(0, 6, 4, 10.0).leaves(torch.float32)
    for ours, _ in TERMS.values():
        value = ours(*inputs, **teacher, **options)
        assert value.isnan()
        assert all(g.isnan().any() for g in gradients(value, inputs, 1.0))


def test_features_of_one_modality_rank_images_and_texts() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    teacher = teacher_of(6)
    for name in (IMAGE, TEXT):
        alone = in_modal(v, t, s, **{name: teacher[name]})
        both = in_modal(v, t, s, **{IMAGE: teacher[name], TEXT: teacher[name]})
        assert torch.equal(alone, both)
        for loss in (RankConsistency(cross_modal=0), RankClipLoss(schedule="constant", lambda_cross=0)):
            assert loss(v, t, s, **{name: teacher[name]}).isfinite()
        for loss in (RankConsistency(), RankClipLoss(schedule=lambda i, n: 0.0)):
            if isinstance(loss, RankClipLoss):
                loss.set_epoch(1, 5)
            with pytest.raises(ValueError, match=f"the cross-modal term needs .*; got {name} alone"):
                loss(v, t, s, **{name: teacher[name]})
        with pytest.raises(ValueError, match=f"got {name} alone"):
            cross_modal(v, t, s, **{name: teacher[name]})
    different = {IMAGE: teacher[IMAGE], TEXT: teacher_of(6, 9)[TEXT]}
    assert in_modal(v, t, s, **different).isfinite()
    with pytest.raises(ValueError, match=r"one dimension in the cross-modal term; got \(6, 5\) and \(6, 9\)"):
        cross_modal(v, t, s, **different)


@pytest.mark.parametrize("loss", [RankConsistency, RankClipLoss])
def test_what_does_not_fit_is_named_and_shown(loss) -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    made: dict[str, Any] = {"schedule": "constant"} if loss is RankClipLoss else {}
    good = teacher_of(6)
    for name in (IMAGE, TEXT):
        for bad, error, message in (
            (good[name].numpy(), TypeError, "must be a torch.Tensor; got numpy.ndarray"),
            (good[name][:5], ValueError, "must have one row per pair"),
            (good[name][0], ValueError, r"must have shape .*; got \(5,\)"),
            (good[name][:, :0], ValueError, r"must have at least one column; got shape \(6, 0\)"),
            (good[name].long(), ValueError, "must be floating point; got torch.int64"),
            (good[name].to("meta"), ValueError, "must be on the device of image_features, cpu; got meta"),
        ):
            with pytest.raises(error, match=f"{name} {message}"):
                loss(**made)(v, t, s, **good | {name: bad})
            with pytest.raises(error, match=f"{name} {message}"):
                in_modal(v, t, s, **{name: bad})
    with pytest.raises(ValueError, match=r"fixed_reference='text' .* does not apply beside reference_image"):
        loss(**made, fixed_reference="text")(v, t, s, **good)
    with pytest.raises(ValueError, match=r"reference_scale=2.0 .* needs reference_image_features or"):
        loss(**made, model="top_one", reference_scale=2)(v, t, s)


def test_a_teacher_that_is_not_unit_norm_is_computed_with_a_warning() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    teacher = teacher_of(6)
    teacher[TEXT] *= torch.linspace(0.5, 2.0, 6, dtype=torch.float64)[:, None]
    with pytest.warns(InputWarning, match="reference_text_features should be unit-norm"):
        value = RankConsistency(in_modal=0)(v, t, s, **teacher)
    expected = reference.cross_modal(*(x.detach().numpy() for x in (v, t)), 10.0, **as_numpy(teacher))
    assert value.item() == pytest.approx(expected, rel=1e-10)


# --- the losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"model": "top_one", "reference_scale": 15.0}])
@pytest.mark.parametrize("budget", [None, 0])
def test_rank_clip_adds_the_terms_to_its_base_in_one_pass(options, budget) -> None:
    inputs, teacher = random_batch(0, 9, 4, 10.0).leaves(), teacher_of(9)
    loss = RankClipLoss(schedule="constant", normalizer=0.3, chunk_size=4, memory_budget=budget, **options)
    entries = loss(*inputs, output_dict=True, **teacher)
    rank = RankConsistency(cross_modal=0.3, in_modal=0.3, **options)(*inputs, output_dict=True, **teacher)
    for name, value in rank.items():
        torch.testing.assert_close(entries[name], value, rtol=1e-12, atol=0)
    base = loss.base(*inputs)
    torch.testing.assert_close(entries["contrastive_loss"], base, rtol=1e-12, atol=0)
    total = gradients(loss(*inputs, **teacher), inputs, -1.3)
    expected = gradients(base + sum(rank.values()), inputs, -1.3)
    for a, b in zip(total, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"lists": "batch"}, {"top_k": 2}, {"model": "top_one"}])
def test_compiles_into_one_graph(options) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    loss = RankClipLoss(schedule="constant", **options)
    inputs = random_batch(0, 8, 4, 10.0).leaves(torch.float32)
    teacher = {name: x.float() for name, x in teacher_of(8, duplicates=2).items()}
    expected = loss(*inputs, **teacher)
    value = torch.compile(loss, backend=counter, fullgraph=True)(*inputs, **teacher)
    torch.testing.assert_close(value, expected)
    for a, b in zip(gradients(value, inputs, 2.5), gradients(expected, inputs, 2.5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_the_operator_keeps_the_contract_of_torch_library() -> None:
    v, t, s = random_batch(0, 5, 3, 10.0).leaves()
    weights = torch.ones(3, dtype=torch.float64)
    arguments = (v, t, None, None, s, weights, None, *teacher_of(5).values(), 0, [True] * 3)
    torch.library.opcheck(
        torch.ops.rankloss.row_lists.default,
        (*arguments, [True, True, False, False, True], RankOptions().encoded),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


ON_AN_ACCELERATOR = [{}, {"top_k": 2}, {"method": "bin"}, {"model": "top_one"}, {"diagonal": False}]
ON_AN_ACCELERATOR += [{"lists": "batch"}, {"lists": "batch", "model": "top_one"}]


@pytest.mark.parametrize("options", ON_AN_ACCELERATOR)
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(options) -> None:
    options = RankOptions(**options)
    with fake_cuda() as copies:
        v, t, f, g = (torch.empty(32, d, device="cuda") for d in (8, 8, 5, 5))
        features = Features.of(v, t, 10.0, reference_image=f, reference_text=g)
        weights = torch.empty(3, dtype=torch.float64, device="cuda")
        found = weighted_terms(features, options, weights)
        assert all(x.device == v.device for x in found)
        if options.lists == "row":  # in a fake mode an operator runs its shape function
            wanted = [True, True, False, False, True]
            call = operator._Call(
                *features.inputs, weights, None, f, g, 0, [True] * 3, wanted, options.encoded
            )
            operator._run(call, *call.unpacked([torch.empty_like(x) for x in found]), wanted)
        assert copies.found == []


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"model": "top_one"}, {"method": "bin", "bins": 16}])
def test_no_tensor_as_large_as_n_by_n_is_ever_made(options, monkeypatch: pytest.MonkeyPatch) -> None:
    original, largest = operator.stream, LargestTensor()

    def watched(*arguments):  # from the inside: a mode does not see into an operator
        with largest:
            return original(*arguments)

    monkeypatch.setattr(operator, "stream", watched)
    n, chunk = 64, 4
    inputs = random_batch(0, n, 8, 10.0).leaves(torch.float32)
    teacher = {name: x.float() for name, x in teacher_of(n, 8).items()}
    RankConsistency(chunk_size=chunk, memory_budget=0, **options)(*inputs, **teacher).backward()
    assert n * chunk <= largest.elements <= 2 * n * 8
    kept = [
        saved_bytes(
            lambda n=n: RankConsistency(chunk_size=8, **options)(
                *random_batch(0, n, 8, 10.0).leaves(torch.float32), **teacher_of(n, 8)
            )
        )
        for n in (64, 256)
    ]
    assert kept[0] > 0
    assert kept[1] <= 4.05 * kept[0]


# --- processes --------------------------------------------------------------------------------------------

N_PER_RANK = 4


def sharded(
    rank: int, world_size: int, flags: tuple[bool, bool], names: list[str], options: dict[str, Any]
) -> list[Tensor]:
    """Value and gradients of this rank, which has its share of the batch and of the teacher's features."""
    n = N_PER_RANK * world_size
    v, t, s = random_batch(0, n, 6, 10.0, duplicates=2).leaves()
    own = slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)
    whole = teacher_of(n, duplicates=2)
    teacher = {name: whole[name][own] for name in names}
    if len(names) == 2:
        teacher[TEXT] = teacher[TEXT].float()  # gathered beside one of another dtype
    gather = Gather(local_loss=flags[0], gather_with_grad=flags[1])
    value = RankClipLoss(schedule="constant", gather=gather, chunk_size=3, **options)(
        v[own], t[own], s, **teacher
    )
    return [value.detach(), *gradients(value, (v, t, s), 1.0)]


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize(
    ("names", "options"),
    [
        ([IMAGE, TEXT], {}),
        ([IMAGE, TEXT], {"top_k": 2}),
        ([IMAGE, TEXT], {"model": "top_one", "reference_scale": 5.0}),
        ([TEXT], {"lambda_cross": 0.0}),
        ([IMAGE, TEXT], {"lists": "batch"}),
    ],
)
def test_the_teachers_features_are_gathered_like_the_others(pool: Pool, flags, names, options) -> None:
    w = pool.world_size
    if options.get("lists") == "batch" and flags[0]:
        return
    results = pool.run(sharded, flags, names, options)
    value, dv, dt, ds = (torch.stack(x).mean(0) for x in zip(*results, strict=True))
    inputs = random_batch(0, N_PER_RANK * w, 6, 10.0, duplicates=2).leaves()
    teacher = teacher_of(N_PER_RANK * w, duplicates=2)
    if len(names) == 2:
        teacher[TEXT] = teacher[TEXT].float()
    whole = RankClipLoss(schedule="constant", **options)(*inputs, **{name: teacher[name] for name in names})
    expected = gradients(whole, inputs, 1.0)
    assert relative_error(value, whole) < 1e-10
    assert relative_error(ds, expected[2]) < 1e-10
    if flags == (True, False):  # exact in the value and the scale only
        return
    share = 1 if flags[1] else w
    for a, b in zip((dv, dt), expected, strict=False):
        assert relative_error(a, b / share) < 1e-10
