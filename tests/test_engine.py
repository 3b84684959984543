"""The engine: blocks of lists, the pass over rows, and its derivatives, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import rankloss
from batches import Batch as Drawn
from batches import assert_close, batches, gradients, random_batch, teacher_of
from devices import DEVICE
from fake_cuda import fake_cuda
from memory import LargestTensor, saved_bytes
from rankloss import dense
from rankloss.batch import Batch
from rankloss.engine import Block, RowLists, evaluate, weighted_terms
from rankloss.functional import cross_modal, in_modal
from rankloss.options import RankOptions
from rankloss.ranking import quantize

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}
WEIGHTS = torch.tensor([0.8, 1.3, 0.6], dtype=torch.float64, device=DEVICE)
IMAGE, TEXT = "reference_image_features", "reference_text_features"
LARGEST_SCORE = 680.0  # summed over 10⁵ items and multiplied by as much again, e^±680 stays within float64


# --- a block of lists -------------------------------------------------------------------------------------


def definition(block: Block, options: RankOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Every list's cross-entropy and C(x | y), and the gradient of their weighted sum, in float64."""
    n_matrices, n, n_items = block.cosines.shape
    x = (block.scale.double() * block.cosines.double()).cpu().requires_grad_()
    source = block.cosines.flip(0) if block.reference is None else block.reference
    y = torch.stack([m if e is None else m[:, e] for m, e in zip(source, block.first_equal, strict=True)])
    kept = torch.ones(n, n_items, dtype=torch.bool)
    if not options.diagonal:
        kept.diagonal(block.first_row).fill_(False)
    lists, y = (a[:, kept].view(n_matrices, n, -1) for a in (x, y.cpu()))
    if options.model == "top_one":
        factor = float(block.scale) if options.reference_scale is None else options.reference_scale
        terms, mu = oracle.top_one_terms(lists, factor * y.double())
    else:
        y = quantize(y, options.bins) if options.method == "bin" else y
        terms, mu = oracle.nll_terms(lists, y, top_k=options.top_k)
    nll = terms.sum(-1) / (mu.sum(-1) if options.reduction == "mean" else 1)
    cross_entropy = x.logsumexp(-1) - x.diagonal(block.first_row, 1, 2)
    zero = torch.zeros(n_matrices, dtype=torch.float64)
    alpha, beta = (zero if w is None else w.cpu() for w in (block.alpha, block.beta))
    total = (alpha[:, None] * cross_entropy + beta[:, None] * nll).sum()
    return cross_entropy, nll, torch.autograd.grad(total, x)[0]


rankings = st.one_of(
    st.fixed_dictionaries({"top_k": st.none() | st.integers(1, 10)}),
    st.fixed_dictionaries(
        {"method": st.just("bin"), "bins": st.integers(2, 12), "top_k": st.none() | st.integers(1, 10)}
    ),
    st.fixed_dictionaries({"model": st.just("top_one"), "reference_scale": st.sampled_from([None, 3.0])}),
)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """With scores of up to ±680 nats, ties, equal items, and weights of either term or both."""
    n_items = draw(st.integers(2, 9))
    n = draw(st.integers(1, n_items))
    n_matrices = draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))

    def cosines() -> Tensor:
        drawn = 2 * torch.rand(n_matrices, n, n_items, generator=generator, dtype=torch.float64) - 1
        steps = draw(st.sampled_from([1, 2, 2**30]))  # few steps make many ties
        return ((drawn * steps).round() / steps).to(DEVICE, dtype)

    weights = [torch.randn(n_matrices, generator=generator, dtype=torch.float64) for _ in range(2)]
    alpha, beta = draw(st.sampled_from([weights, [None, weights[1]], [weights[0], None]]))
    equal = draw(st.sampled_from([None, torch.arange(n_items).div(2, rounding_mode="floor")]))
    scale = draw(st.sampled_from([1.0, 10.0, 100.0, LARGEST_SCORE]))
    return Block(
        cosines(),
        torch.tensor(scale, dtype=dtype, device=DEVICE),
        None if alpha is None else alpha.to(DEVICE),
        None if beta is None else beta.to(DEVICE),
        draw(st.sampled_from([None, cosines()])),
        tuple(None if k == 1 or equal is None else equal.to(DEVICE) for k in range(n_matrices)),
        draw(st.integers(0, n_items - n)),
    )


@settings(max_examples=250)
@given(
    block=blocks(),
    ranking=rankings,
    lists=st.fixed_dictionaries(
        {"diagonal": st.sampled_from([True, False]), "reduction": st.sampled_from(["mean", "sum"])}
    ),
    with_gradient=st.sampled_from([True, True, False]),
)
def test_a_block_is_its_lists_in_value_and_gradient(
    block: Block, ranking: dict[str, Any], lists, with_gradient: bool
) -> None:
    options = RankOptions(**ranking, **lists)
    is_absent = (block.alpha is None, block.beta is None, not with_gradient)
    expected = [x for x, absent in zip(definition(block, options), is_absent, strict=True) if not absent]
    given_cosines = block.cosines.clone()
    found = evaluate(block, options, with_gradient=with_gradient)
    assert with_gradient or torch.equal(block.cosines, given_cosines)
    assert tuple(x is None for x in found) == is_absent
    assert_close([x for x in found if x is not None], expected, TOLERANCE[block.cosines.dtype])


@pytest.mark.parametrize("scale", [7.0, 700.0])
def test_top_one_probabilities_are_the_softmax_and_keep_a_shared_rounding_out(scale: float) -> None:
    y = torch.tensor([[0.9, 0.8999, -0.3], [0.1, 0.1, 0.1]], requires_grad=True)
    p = dense.top_one_probabilities(y, torch.tensor(scale, requires_grad=True), RankOptions(model="top_one"))
    assert not p.requires_grad
    assert_close([p], [(scale * y.detach().double()).softmax(-1)], 1e-6)
    own = RankOptions(model="top_one", reference_scale=2.0)
    assert_close(
        [dense.top_one_probabilities(y, torch.tensor(scale), own)], [(2 * y.double()).softmax(-1)], 1e-6
    )


# --- the pass ---------------------------------------------------------------------------------------------

list_options = st.one_of(
    st.fixed_dictionaries({"top_k": st.none() | st.integers(1, 9)}),
    st.fixed_dictionaries({"method": st.just("bin"), "bins": st.integers(2, 12)}),
    st.just({"model": "top_one"}),
)
directions = st.fixed_dictionaries(
    {
        "diagonal": st.sampled_from([True, False]),
        "reduction": st.sampled_from(["mean", "sum"]),
        "fixed_reference": st.sampled_from([None, "image", "text"]),
    }
)


def features_of(drawn: Drawn, rows: slice | None, teacher: dict[str, Tensor]) -> Batch:
    """With leaves of its own for the anchors, which are these rows of the items; None is all of them."""
    image, text, scale = drawn.leaves()
    anchors = None
    if rows is not None:
        anchors = tuple(x.detach()[rows].clone().requires_grad_() for x in (image, text))
    return Batch.of(
        image,
        text,
        scale,
        anchors=anchors,  # type: ignore[arg-type]
        first_row=0 if rows is None else rows.start,
        teacher=(teacher.get(IMAGE), teacher.get(TEXT)),
    )


def by_definition(batch: Batch, options: RankOptions, wanted: tuple[bool, ...], by: list[bool]) -> Any:
    terms = dense.terms(batch, options, WEIGHTS, wanted)
    inputs = [x for x, w in zip(batch.inputs, by, strict=True) if w and x is not None]
    if not inputs:
        return terms, []
    return terms, torch.autograd.grad(sum(terms), inputs, allow_unused=True, materialize_grads=True)


def stream(
    batch: Batch,
    options: RankOptions,
    wanted: Sequence[bool] = (True,) * 3,
    with_gradient: bool = True,
    weights: Tensor = WEIGHTS,
) -> Any:
    with torch.no_grad():
        return RowLists(batch, options, wanted).stream(batch.inputs, weights, with_gradient)


@settings(max_examples=120)
@given(
    drawn=batches(),
    options=list_options,
    choices=directions,
    given_teacher=st.sampled_from([(), (), (IMAGE, TEXT), (IMAGE,), (TEXT,)]),
    wanted=st.sampled_from(
        [(True,) * 3] * 3 + [(True, False, False), (False, True, False), (True, False, True)]
    ),
    with_gradient=st.sampled_from([True, True, False]),
    layout=st.sampled_from(["whole", "share"]),
    chunk_size=st.none() | st.integers(1, 12),
    data=st.data(),
)
def test_the_pass_is_the_definition_in_value_and_in_every_gradient(
    drawn: Drawn, options, choices, given_teacher, wanted, with_gradient, layout: str, chunk_size, data
) -> None:
    n = len(drawn.image)
    if given_teacher:
        choices = {**choices, "fixed_reference": None}
        wanted = (wanted[0], wanted[1] and len(given_teacher) == 2, True)
    rows = None
    if layout == "share":
        first = data.draw(st.integers(0, n - 1))
        rows = slice(first, data.draw(st.integers(first + 1, n)))
    teacher = {name: x for name, x in teacher_of(n, duplicates=1).items() if name in given_teacher}
    batch = features_of(drawn, rows, teacher)
    checked = RankOptions(chunk_size=chunk_size, **options, **choices)
    values, found = stream(batch, checked, wanted, with_gradient)
    by = [with_gradient and x is not None for x in batch.inputs]
    terms, owed = by_definition(batch, checked, wanted, by)
    assert [x is not None for x in found] == by
    assert_close([*values, *(x for x in found if x is not None)], [*terms, *owed], 1e-10)


@pytest.mark.parametrize("n", [7, 17, 65])
@pytest.mark.parametrize("chunk_size", [1, 2, 65])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_equal_items_tie_exactly_whatever_the_products_rounding(n: int, chunk_size: int, has_teacher) -> None:
    # A matrix product rounds the columns of equal items differently where they fall on a kernel's edge.
    drawn = random_batch(n, n, 5, 10.0, duplicates=3)
    teacher = teacher_of(n, 13, duplicates=3) if has_teacher else {}
    v, t, s = (x.detach() for x in drawn.leaves(torch.float32))
    references = teacher.get(IMAGE), teacher.get(TEXT)
    batch = Batch.of(v, t, s, teacher=references)
    values, _ = stream(batch, RankOptions(chunk_size=chunk_size), with_gradient=False)
    exact = Batch.of(v.double(), t.double(), s, teacher=references)
    assert_close(values, by_definition(exact, RankOptions(), (True,) * 3, [False] * 5)[0], 1e-6)


# --- cost --------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products (torch's own counter passes over those in place)."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        factors = {aten.mm.default: args[:2], aten.mm.out: args[:2], aten.addmm_.default: args[1:3]}.get(func)
        if factors:
            self.count += factors[0].numel() * factors[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("chunk_size", "wanted", "of_student", "of_teacher"),
    [
        (8, (True, True, True), 12, 4),
        (8, (False, False, True), 6, 2),
        (32, (True, True, True), 7, 4),
        (None, (True, True, True), 7, 4),
        (None, (True, True, False), 3, 2),
        (None, (False, False, True), 4, 2),
    ],
)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_pass_takes_as_many_products_as_it_says(
    chunk_size: int | None, wanted, of_student: float, of_teacher: float, has_teacher: bool
) -> None:
    n = 32
    batch = features_of(random_batch(0, n, 8, 10.0), None, teacher_of(n, 8) if has_teacher else {})
    with Products() as counted:
        stream(batch, RankOptions(chunk_size=chunk_size), wanted)
    assert counted.count == (of_student + of_teacher * has_teacher) * n * n * 8


@pytest.mark.parametrize("loss", [rankloss.RankConsistency(), rankloss.RankClipLoss(schedule="constant")])
def test_a_backward_pass_under_one_upstream_value_multiplies_nothing(loss: Any) -> None:
    inputs = random_batch(0, 32, 8, 10.0).leaves()
    with Products() as counted:
        (3.0 * loss(*inputs)).backward()
    assert counted.count == 7 * 32 * 32 * 8


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"model": "top_one"}, {"method": "bin", "bins": 16}, {"diagonal": False}]
)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_no_tensor_as_large_as_n_by_n_is_made_of_a_large_batch(options, has_teacher: bool) -> None:
    n, d, chunk_size = 128, 8, 4
    batch = features_of(random_batch(0, n, d, 10.0), None, teacher_of(n, d) if has_teacher else {})
    largest = []
    for rows in (chunk_size, None):
        with LargestTensor() as seen:
            stream(batch, RankOptions(chunk_size=rows, **options))
        largest.append(seen.elements)
    assert n * d <= largest[0] <= 2 * n * chunk_size < n * n  # of two matrices
    assert largest[1] >= n * n  # the measurement sees such a tensor where there is one


def batch_of(inputs: Sequence[Any], n_teacher: int = 0, **layout: Any) -> Batch:
    v, t, s = inputs
    teacher = teacher_of(n_teacher, duplicates=1).values() if n_teacher else (None, None)
    return Batch.of(v, t, s, teacher=tuple(teacher), **layout)


def weighted(terms: Sequence[Tensor], upstream: Sequence[float | None]) -> Tensor:
    """The sum of the terms that are used, each with an upstream value of its own."""
    used = [u * x for u, x in zip(upstream, terms, strict=True) if u is not None]
    return torch.stack(used).sum()


UPSTREAMS: list[tuple[float | None, ...]] = [
    (2.5, 2.5, 2.5),
    (1.0, -2.0, 0.5),
    (0.0, 1.5, 0.0),
    (-1.7, None, 0.3),
]
UPSTREAMS += [(None, 1.7, 1.7), (None, None, -0.4), (0.9, None, None)]
LISTS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "reduction": "sum"},
    {"method": "bin", "bins": 5, "diagonal": False},
    {"model": "top_one", "fixed_reference": "text"},
]


# --- derivatives ------------------------------------------------------------------------------------------


@given(
    drawn=batches(),
    options=st.sampled_from(LISTS),
    chunk_size=st.none() | st.integers(1, 9),
    upstream=st.sampled_from(UPSTREAMS),
)
def test_terms_and_gradients_are_those_of_the_definition(drawn: Drawn, options, chunk_size, upstream) -> None:
    inputs = drawn.leaves()
    checked = RankOptions(chunk_size=chunk_size, **options)
    terms = weighted_terms(batch_of(inputs), checked, WEIGHTS, (True,) * 3)
    expected = dense.terms(batch_of(inputs), checked, WEIGHTS, (True,) * 3)
    assert_close(terms, expected, 1e-10)
    found, wanted = (
        torch.autograd.grad(weighted(x, upstream), inputs, allow_unused=True, materialize_grads=True)
        for x in (terms, expected)
    )
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_unequal_upstream_values_cost_no_look_where_none_is_free(
    upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_cpu", False)  # as on an accelerator
    inputs = random_batch(3, 9, 5, 20.0, duplicates=2).leaves()
    terms, expected = (
        f(batch_of(inputs), RankOptions(), WEIGHTS, (True,) * 3) for f in (weighted_terms, dense.terms)
    )
    found, owed = (gradients(weighted(x, upstream), inputs, 1.7) for x in (terms, expected))
    assert_close(found, owed, 1e-9)


@pytest.mark.parametrize(
    ("options", "has_teacher"),
    [
        ({}, False),
        ({"diagonal": False, "fixed_reference": "text", "top_k": 2}, False),
        ({"reduction": "sum", "lists": "batch"}, False),
        ({"worth": "shifted", "discount": "log", "reduction": "none"}, False),
        # Finite differences would move a reference that is the batch's own, and the scale of the scores.
        ({"model": "top_one", "reference_scale": 2.0}, True),
    ],
)
def test_first_and_second_derivatives_are_right(options, has_teacher: bool) -> None:
    checked = RankOptions(chunk_size=2, **options)
    inputs = random_batch(1, 5, 3, 2.0).leaves()
    inputs = inputs[:2] if "worth" in options else inputs  # which alone depends on the scale

    def f(*inputs: Tensor) -> Tensor:
        v, t, *s = inputs
        batch = batch_of((v, t, *(s or [1.0])), 5 * has_teacher)
        terms = weighted_terms(batch, checked, WEIGHTS, (not options, True, True))
        return torch.stack(terms[bool(options) :])

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_an_input_computed_of_another_is_differentiated_twice_along_its_own_path(upstream) -> None:
    """As gathered features are, of which the local ones are a part."""
    inputs = v, t, _ = random_batch(1, 6, 3, 5.0, duplicates=1).leaves()
    results = []
    for f in (weighted_terms, dense.terms):
        batch = batch_of(inputs, anchors=(v[1:4], t[1:4]), first_row=1)
        value = weighted(f(batch, RankOptions(), WEIGHTS, (True,) * 3), upstream)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)])
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_fixed_reference_alone_has_no_gradient_and_can_be_differentiated_again(name: str) -> None:
    """Its gradient comes from its similarities as scores, and those may be absent."""
    v, t, s = (x.detach() for x in random_batch(0, 6, 4, 10.0).leaves())
    only = (t if name == "text" else v).requires_grad_()
    for term in (cross_modal, in_modal):
        value = term(v, t, s, fixed_reference=name)
        first, second = (
            torch.autograd.grad(1.7 * value, only, create_graph=again, retain_graph=True, allow_unused=True)[
                0
            ]
            for again in (False, True)
        )
        assert_close([second], [first], 1e-10)
        assert bool(first.any()) == (term is cross_modal)


@pytest.mark.parametrize("options", [x for x in LISTS if "model" not in x])
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_scores_too_large_for_float64_sums_give_no_number(options, scale: float) -> None:
    inputs = random_batch(1, 12, 3, scale).leaves()
    _, *terms = weighted_terms(batch_of(inputs), RankOptions(**options), WEIGHTS, (False, True, True))
    assert not torch.stack(terms).isfinite().any()


@pytest.mark.parametrize("options", LISTS)
def test_a_product_of_hessian_and_vector_by_two_backward_passes_is_right(options) -> None:
    v, t, s = (x.detach() for x in random_batch(2, 6, 4, 5.0).leaves())
    checked, other = RankOptions(**options), torch.ones_like(v)

    def f(x: Tensor) -> Tensor:
        return torch.stack(weighted_terms(batch_of((x, t, s)), checked, WEIGHTS, (True,) * 3)).sum()

    _, found = torch.autograd.functional.hvp(f, v, other)
    x = v.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    assert_close([found], torch.autograd.grad(first, x, other), 1e-10)


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"model": "top_one"}])
def test_what_forward_keeps_for_backward_grows_linearly_in_n(options) -> None:
    def kept(n: int) -> int:
        inputs = random_batch(0, n, 8, 10.0).leaves(torch.float32)
        checked = RankOptions(chunk_size=8, **options)
        return saved_bytes(lambda: weighted_terms(batch_of(inputs, n), checked, WEIGHTS, (True,) * 3))

    assert 0 < kept(256) <= 4.05 * kept(64)
    assert kept(256) < 256 * 256 * 4  # less than one N×N matrix


# --- on an accelerator ------------------------------------------------------------------------------------

RANKED: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_k": 40, "reduction": "sum"},
    {"method": "bin", "bins": 8},
    {"method": "bin", "bins": 100},
    {"method": "bin", "bins": 8, "top_k": 3},
    {"model": "top_one"},
    {"diagonal": False},
    {"fixed_reference": "text"},
]
TEACHERS = [{}, {"top_k": 3, "diagonal": False}, {"method": "bin", "bins": 8}]
TEACHERS += [{"model": "top_one", "reference_scale": 3.0}]
STEPS = [(options, False, k % 2 == 0, k % 3 == 0) for k, options in enumerate(RANKED)]
STEPS += [(options, True, k % 2 == 1, k % 3 == 1) for k, options in enumerate(TEACHERS)]


def on_cuda(has_teacher: bool, n: int = 32, **arguments: Any) -> tuple[Batch, Tensor]:
    v, t, f, g = (torch.empty(n, d, device="cuda") for d in (8, 8, 5, 5))
    if has_teacher:
        arguments |= {"teacher": (f, g)}
    if arguments.pop("is_share", False):
        arguments |= {"anchors": (v[:16], t[:16]), "first_row": 4}
    scale = torch.empty((), device="cuda") if has_teacher else 10.0
    return Batch.of(v, t, scale, **arguments), torch.empty(3, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize(("options", "has_teacher", "is_share", "is_chunked"), STEPS)
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(
    options, has_teacher: bool, is_share: bool, is_chunked: bool
) -> None:
    checked = RankOptions(chunk_size=8 if is_chunked else None, **options)
    with fake_cuda() as copies:
        batch, weights = on_cuda(has_teacher, is_share=is_share)
        terms = weighted_terms(batch, checked, weights, (True,) * 3)
        assert all((x.device, x.shape) == (batch.inputs.image.device, ()) for x in terms)
        _, found = stream(batch, checked, weights=weights)
        assert [x is None or x.shape for x in found] == [y is None or y.shape for y in batch.inputs]
        assert copies.found == []


@pytest.mark.parametrize(
    ("options", "has_teacher"),
    [
        ({"lists": "batch"}, False),
        ({"lists": "batch"}, True),
        ({"lists": "batch", "model": "top_one"}, True),
        ({"lists": "batch", "diagonal": False, "worth": "shifted"}, False),
        ({"worth": "identity", "top_k": 2}, True),
        ({"ties": "random"}, False),
        ({"discount": "log", "diagonal": False}, False),
        ({"reduction": "none"}, True),
    ],
)
def test_what_does_not_stream_never_waits_nor_copies_either(options, has_teacher: bool) -> None:
    with fake_cuda() as copies:
        batch, weights = on_cuda(has_teacher, n=8)
        contrastive = options.get("worth", "exp") == "exp"
        terms = weighted_terms(batch, RankOptions(**options), weights, (contrastive, True, True))
        shape = (8,) if options.get("reduction") == "none" else ()
        assert all((x.device, x.shape) == (batch.inputs.image.device, shape) for x in terms)
        assert copies.found == []


def test_a_wait_and_a_copy_would_be_seen() -> None:
    with fake_cuda() as copies:
        x = torch.empty(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            bool(x[0] > 0)
        torch.ops.aten._to_copy.default(torch.empty(3), device=torch.device("cuda"))
        assert copies.found == ["aten._to_copy.default"]
