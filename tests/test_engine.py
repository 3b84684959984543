"""The engine: blocks of lists, the pass over rows, and its derivatives, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import drawn_options
import rankloss
from batches import Batch as Drawn
from batches import assert_close, batches, random_batch, teacher_of
from blocks_oracle import definition
from devices import DEVICE
from drawn_options import CHANGES, is_streamed, together, with_teachers
from fake_devices import CUDA, meta_is
from memory import TensorSizes, saved_bytes
from rankloss import dense, engine, reference
from rankloss.batch import Batch
from rankloss.engine import Block, evaluate, weighted_terms
from rankloss.options import RankOptions

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}
FACTORS = (0.8, 1.3, 0.6)
WEIGHTS = torch.tensor(FACTORS, dtype=torch.float64, device=DEVICE)
IMAGE, TEXT = "reference_image_features", "reference_text_features"
STREAMED = [x for x in [{}, *CHANGES] if is_streamed(RankOptions(**x)) and "chunk_size" not in x]
LARGEST_SCORE = 680.0  # summed over 10⁵ items and multiplied by as much again, e^±680 stays within float64


# --- a block of lists -------------------------------------------------------------------------------------


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


@settings(max_examples=120)
@given(
    block=blocks(),
    options=drawn_options.options(is_streamed),
    with_gradient=st.sampled_from([True, True, False]),
    looks=st.booleans(),
)
def test_a_block_is_its_lists_in_value_and_gradient(
    block: Block, options: Any, with_gradient: bool, looks: bool
) -> None:
    """Also where no look is free, as on an accelerator."""
    options = RankOptions(**options)
    if not looks and block.cosines.dtype == torch.float32:  # sums of logarithms
        alpha, beta = (None if w is None else w.float() for w in (block.alpha, block.beta))
        block = block._replace(alpha=alpha, beta=beta)
    is_absent = (block.alpha is None, block.beta is None, not with_gradient)
    expected = [x for x, absent in zip(definition(block, options), is_absent, strict=True) if not absent]
    given_cosines = block.cosines.clone()
    with pytest.MonkeyPatch.context() as patch:
        if not looks:
            patch.setattr(Tensor, "is_cpu", False)
        found = evaluate(block, options, with_gradient=with_gradient)
    assert with_gradient or torch.equal(block.cosines, given_cosines)
    assert tuple(x is None for x in found) == is_absent
    tolerance = TOLERANCE[block.cosines.dtype]
    if not looks:  # scores are rounded, too
        tolerance *= max(1.0, block.scale.item() / 5)
    assert_close([x for x in found if x is not None], expected, tolerance)


# --- the pass ---------------------------------------------------------------------------------------------


def features_of(drawn: Drawn, rows: slice | None, teacher: dict[str, Tensor], by: Sequence[bool]) -> Batch:
    """With leaves of its own for the anchors, which are these rows of the items; None is all of them.

    ``by`` says for each of the inputs whether it takes a gradient.
    """
    image, text, scale = drawn.leaves()
    anchors = None if rows is None else tuple(x.detach()[rows].clone() for x in (image, text))
    for x, takes in zip((image, text, *(anchors or (None, None)), scale), by, strict=True):
        if x is not None:
            x.requires_grad_(takes)
    return Batch.of(
        image,
        text,
        scale,
        anchors=anchors,  # type: ignore[arg-type]
        first_row=0 if rows is None else rows.start,
        teacher=(teacher.get(IMAGE), teacher.get(TEXT)),
    )


UPSTREAMS: list[tuple[float | None, ...]] = [
    (2.5, 2.5, 2.5),
    (1.0, -2.0, 0.5),
    (0.0, 1.5, 0.0),
    (-1.7, None, 0.3),
    (None, 1.7, 1.7),
    (None, None, -0.4),
    (0.9, None, None),
]


def weighted(terms: Sequence[Tensor], upstream: Sequence[float | None]) -> Tensor:
    """The sum of the terms that are used, each with an upstream value of its own."""
    used = [u * x for u, x in zip(upstream, terms, strict=True) if u is not None]
    return torch.stack(used).sum()


def differentiated(total: Tensor, inputs: Sequence[Tensor], *, again: bool = False) -> Sequence[Tensor]:
    if not (inputs and total.requires_grad):
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(total, inputs, create_graph=again, allow_unused=True, materialize_grads=True)


def choose_chunks(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Let the engine choose chunks of so many rows."""
    patch.setattr(engine, "_FEWEST_ROWS", rows)
    patch.setattr(engine, "_CHUNK", {})
    patch.setattr(engine, "_CHUNK_ELSEWHERE", 0)


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    """Let the features seem to be on an accelerator, where a look at their values is a wait."""
    patch.setattr(Tensor, "is_cpu", False)
    patch.setattr(torch, "equal", None)


@st.composite
def shares(draw: st.DrawFn, n: int) -> slice:
    """One process's rows of n."""
    first = draw(st.integers(0, n - 1))
    return slice(first, draw(st.integers(first + 1, n)))


@settings(max_examples=80)
@given(
    drawn=batches(),
    options=drawn_options.options(is_streamed),
    given_teacher=st.sampled_from([(), (), (IMAGE, TEXT), (IMAGE,), (TEXT,)]),
    wanted=st.sampled_from(
        [(True,) * 3] * 3 + [(True, False, False), (False, True, False), (True, False, True)]
    ),
    upstream=st.sampled_from(UPSTREAMS),
    by=st.just([True] * 5) | st.lists(st.booleans(), min_size=5, max_size=5),
    is_share=st.booleans(),
    chunk_size=st.integers(1, 12),
    keeps_graph=st.booleans(),
    can_read=st.booleans(),
    data=st.data(),
)
def test_the_pass_is_the_definition_in_value_and_in_every_gradient(
    drawn: Drawn,
    options,
    given_teacher,
    wanted,
    upstream,
    by,
    is_share,
    chunk_size,
    keeps_graph,
    can_read,
    data,
) -> None:
    """Under any upstream values, in chunks of an option or of the engine's choice, where gradients are kept,
    with and without a graph of the gradients, and where no look is free.

    ``by`` are the inputs that require a gradient, ``is_share`` is of one process of several, and without
    ``looks`` the device is one on which reading a value would wait.
    """
    n = len(drawn.image)
    not_beside = "fixed_reference" if given_teacher else "reference_scale"
    rank_options = RankOptions(**{**options, not_beside: None})
    if given_teacher:  # one of one modality has no cross-modal term, so the in-modal term is always wanted
        contrastive, cross_modal, _ = wanted
        wanted = (contrastive, cross_modal and len(given_teacher) == 2, True)
    rows = data.draw(shares(n)) if is_share else None
    teacher = {name: x for name, x in teacher_of(n, duplicates=1).items() if name in given_teacher}
    batch = features_of(drawn, rows, teacher, by)
    inputs = [x for x in batch.inputs if x is not None and x.requires_grad]
    expected_terms = dense.terms(batch, rank_options, WEIGHTS, wanted)
    expected_gradients = differentiated(weighted(expected_terms, upstream), inputs)
    with pytest.MonkeyPatch.context() as patch:
        choose_chunks(patch, chunk_size)
        if not can_read:
            forbid_reading(patch)
        terms = weighted_terms(batch, rank_options, FACTORS, wanted)
        gradients = differentiated(weighted(terms, upstream), inputs, again=keeps_graph)
    assert_close([*terms, *gradients], [*expected_terms, *expected_gradients], 1e-9)


@pytest.mark.parametrize("n", [7, 17, 65])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_equal_items_tie_exactly_whatever_the_products_rounding(n: int, has_teacher: bool) -> None:
    # A matrix product rounds the columns of equal items differently where they fall on a kernel's edge.
    inputs = random_batch(n, n, 5, 10.0, duplicates=3).leaves(torch.float32)
    teacher = teacher_of(n, 13, duplicates=3) if has_teacher else {}
    exact = [x.detach().double().cpu().numpy() for x in inputs]
    given = {name: x.cpu().numpy() for name, x in teacher.items()}
    owed = sum(term(*exact, **given) for term in (reference.cross_modal, reference.in_modal))
    values = [rankloss.RankConsistency(chunk_size=size)(*inputs, **teacher) for size in (1, 2, n)]
    assert_close(values, [owed] * 3, 1e-6)


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
    ("chunk_size", "chosen", "largest_kept", "of_student"),
    [(None, 8, 32, 8), (None, 8, 31, 12), (None, 32, 31, 8), (32, 8, 31, 8), (8, 32, 32, 12)],
)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_a_step_takes_as_many_products_as_it_says(
    monkeypatch, chunk_size: int | None, chosen: int, largest_kept: int, of_student: int, has_teacher: bool
) -> None:
    n, d = 32, 8
    choose_chunks(monkeypatch, chosen)
    monkeypatch.setattr(engine, "_KEPT", largest_kept**2)
    loss = rankloss.RankClipLoss(schedule="constant", chunk_size=chunk_size)
    with Products() as counted:
        (
            3.0 * loss(*random_batch(0, n, d, 10.0).leaves(), **teacher_of(n, d) if has_teacher else {})
        ).backward()
    assert counted.count == (of_student + 4 * has_teacher) * n * n * d


VALUES: dict[str, tuple[Any, int]] = {  # with the products that its values take
    "clip": (lambda: rankloss.ClipLoss(memory_budget=0), 2),
    "siglip": (lambda: rankloss.SigLipLoss(memory_budget=0), 1),
    "rankclip": (lambda: rankloss.RankClipLoss(schedule="constant"), 4),
    "ranks": (lambda: rankloss.RankConsistency(), 4),
    "bins": (lambda: rankloss.RankConsistency(method="bin", bins=8, in_modal=0.0), 2),
    "top_one": (lambda: rankloss.RankConsistency(model="top_one", cross_modal=0.0), 2),
}


@pytest.mark.parametrize("without", ["no_grad", "inference_mode", "enable_grad"])
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.filterwarnings("ignore:logit_bias is not given")
def test_without_gradients_only_values_are_computed(name: str, without: str) -> None:
    """Also if the features have a graph; with gradients enabled they have none."""
    n, d = 32, 8
    loss, products = VALUES[name]
    inputs = random_batch(0, n, d, 10.0).leaves()
    expected = loss()(*inputs)
    if without == "enable_grad":
        inputs = tuple(x.detach() for x in inputs)
    with getattr(torch, without)(), Products() as counted:
        value = loss()(*inputs)
    assert counted.count == products * n * n * d
    assert torch.equal(value, expected)
    assert not value.requires_grad


@pytest.mark.parametrize(("options", "has_teacher"), with_teachers(STREAMED))
def test_memory_grows_linearly_in_n(options, has_teacher: bool) -> None:
    """What forward keeps for backward, and the largest tensor."""
    kept, largest = {}, {}
    for n, rows in ((32, 4), (128, 4), (128, None)):
        inputs = random_batch(0, n, 8, 10.0).leaves(torch.float32)
        teacher = teacher_of(n, duplicates=1) if has_teacher else {}
        loss = rankloss.RankClipLoss(schedule="constant", chunk_size=rows, **options)
        kept[n, rows] = saved_bytes(lambda: loss(*inputs, **teacher))  # noqa: B023
        with TensorSizes() as sizes:
            loss(*inputs, **teacher).backward()
        largest[n, rows] = sizes.largest
    assert 0 < kept[128, 4] <= 4.05 * kept[32, 4]
    assert kept[128, 4] < 4 * 128**2  # less than one N×N matrix
    assert 128 * 8 <= largest[128, 4] <= 2 * 128 * 4  # of two matrices
    assert largest[128, None] >= 128**2  # the measurement sees such a tensor where there is one


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [x for x in STREAMED if "model" not in x])
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_scores_too_large_for_float64_sums_give_no_number(options, scale: float) -> None:
    inputs = random_batch(1, 12, 3, scale).leaves()
    _, *terms = weighted_terms(Batch.of(*inputs), RankOptions(**options), FACTORS, (False, True, True))
    assert not torch.stack(terms).isfinite().any()


# --- on an accelerator ------------------------------------------------------------------------------------

PAIRS = [together({**x, **y}) for x, y in zip(CHANGES, [*CHANGES[5:], *CHANGES[:5]], strict=True)]


@pytest.mark.parametrize(
    ("options", "has_teacher"),
    [*with_teachers([{}, *CHANGES]), *(x for n, x in enumerate(with_teachers(PAIRS)) if n % 4 in (0, 3))],
)
def test_a_step_on_an_accelerator_never_waits_for_it_and_copies_the_weights_alone_to_it(
    options, has_teacher: bool
) -> None:
    checked = RankOptions(**options)
    v, t, f, g = (torch.empty(32, d, device="meta", requires_grad=d == 8) for d in (8, 8, 5, 5))
    arguments: dict[str, Any] = {"teacher": (f, g)} if has_teacher else {}
    if len(options) == 2 and is_streamed(checked):
        arguments |= {"anchors": (v[:16], t[:16]), "first_row": 4}
    with meta_is(CUDA) as copies:
        batch = Batch.of(v, t, torch.empty((), device="meta") if has_teacher else 10.0, **arguments)
        terms = weighted_terms(batch, checked, FACTORS, (True, True, True))
        assert {(x.device, x.shape) for x in terms} == {(CUDA, (32,) if checked.reduction == "none" else ())}
        torch.stack(terms).sum().backward()
        assert {v.grad.device, t.grad.device} == {CUDA}
    assert copies == ["aten._to_copy.default"]
