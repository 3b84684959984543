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
from blocks_oracle import terms_and_gradient_by_definition
from devices import DEVICE
from drawn_options import CHANGES, is_streamed, together, with_teachers
from fake_devices import CUDA, meta_is
from memory import TensorSizes, saved_bytes
from rankloss import dense, engine, reference
from rankloss.batch import Batch
from rankloss.engine import Block, evaluate, weighted_terms
from rankloss.options import RankOptions

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}
WEIGHTS = (0.8, 1.3, 0.6)
"""The weights of CLIP's loss, the cross-modal and the in-modal term."""
IMAGE, TEXT = "reference_image_features", "reference_text_features"
STREAMED = [
    options
    for options in [{}, *CHANGES]
    if is_streamed(RankOptions(**options)) and "chunk_size" not in options
]
"""No option, and each option alone with which lists are computed in linear memory."""
LARGEST_SCORE = 680.0  # summed over 10⁵ items and multiplied by as much again, e^±680 stays within float64


# --- a block of lists -------------------------------------------------------------------------------------


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Blocks with scores of up to ±680 nats, ties, equal items, and weights of either term or both."""
    n_items = draw(st.integers(2, 9))
    n = draw(st.integers(1, n_items))
    n_matrices = draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))

    def cosines() -> Tensor:
        drawn = 2 * torch.rand(n_matrices, n, n_items, generator=generator, dtype=torch.float64) - 1
        steps = draw(st.sampled_from([1, 2, 2**30]))  # few steps make many ties
        return ((drawn * steps).round() / steps).to(DEVICE, dtype)

    def weights() -> Tensor:
        return torch.randn(n_matrices, generator=generator, dtype=torch.float64).to(DEVICE)

    alpha, beta = weights(), weights()
    has_alpha, has_beta = draw(st.sampled_from([(True, True), (False, True), (True, False)]))
    first_of_two = torch.arange(n_items, device=DEVICE) // 2  # items 2j and 2j + 1 take item j's cosine
    first_equal = draw(st.sampled_from([None, first_of_two]))  # of the first matrix alone
    scale = draw(st.sampled_from([1.0, 10.0, 100.0, LARGEST_SCORE]))
    return Block(
        cosines=cosines(),
        scale=torch.tensor(scale, dtype=dtype, device=DEVICE),
        alpha=alpha if has_alpha else None,
        beta=beta if has_beta else None,
        reference=draw(st.sampled_from([None, cosines()])),
        first_equal=(first_equal, None)[:n_matrices],
        first_row=draw(st.integers(0, n_items - n)),
    )


@settings(max_examples=120)
@given(
    block=blocks(),
    options=drawn_options.options(is_streamed),
    with_gradient=st.sampled_from([True, True, False]),
    is_on_cpu=st.booleans(),
)
def test_a_block_is_its_lists_in_value_and_gradient(
    block: Block, options: Any, with_gradient: bool, is_on_cpu: bool
) -> None:
    """Values and gradient are those of ``rankloss.dense`` and autograd, on whole rows in float64.

    With and without each term and the gradient, on a CPU and by the code for accelerators.
    """
    rank_options = RankOptions(**options)
    if not is_on_cpu and block.cosines.dtype == torch.float32:
        # Weights in float32 make the engine add logarithms in float32, as on a device without float64.
        alpha, beta = (None if w is None else w.float() for w in (block.alpha, block.beta))
        block = block._replace(alpha=alpha, beta=beta)
    cross_entropy, nll, by_scores = terms_and_gradient_by_definition(block, rank_options)
    owed = (  # what is not wanted is None
        None if block.alpha is None else cross_entropy,
        None if block.beta is None else nll,
        by_scores if with_gradient else None,
    )
    cosines_before = block.cosines.clone()
    with pytest.MonkeyPatch.context() as patch:
        if not is_on_cpu:  # the code for accelerators, in which no branch depends on a value
            patch.setattr(Tensor, "is_cpu", False)
        evaluated = evaluate(block, rank_options, with_gradient=with_gradient)
    if not with_gradient:  # the gradient, where it is wanted, overwrites the cosines
        assert torch.equal(block.cosines, cosines_before)
    assert [x is None for x in evaluated] == [x is None for x in owed]
    tolerance = TOLERANCE[block.cosines.dtype]
    if not is_on_cpu:  # then scores are rounded to the cosines' dtype, an error that grows with the scale
        tolerance *= max(1.0, block.scale.item() / 5)
    assert_close([x for x in evaluated if x is not None], [x for x in owed if x is not None], tolerance)


# --- the pass ---------------------------------------------------------------------------------------------


def engine_batch(
    drawn: Drawn, rows: slice | None, teacher: dict[str, Tensor], needs_gradient: Sequence[bool]
) -> Batch:
    """The engine's batch of the drawn items, whose anchors are some rows of them, in leaves of their own.

    Args:
        drawn: The items and the scale.
        rows: The items that are anchors, as one of several processes has them; None for all.
        teacher: The teacher's features by their argument's name.
        needs_gradient: Whether images, texts, anchors of images, anchors of texts and the scale need one.
    """
    image, text, scale = drawn.leaves()
    anchors = None if rows is None else tuple(x.detach()[rows].clone() for x in (image, text))
    for leaf, needs in zip((image, text, *(anchors or (None, None)), scale), needs_gradient, strict=True):
        if leaf is not None:
            leaf.requires_grad_(needs)
    return Batch.of(
        image,
        text,
        scale,
        anchors=anchors,  # type: ignore[arg-type]
        first_row=0 if rows is None else rows.start,
        teacher=(teacher.get(IMAGE), teacher.get(TEXT)),
    )


UPSTREAMS: list[tuple[float | None, ...]] = [
    # Of CLIP's loss, the cross-modal and the in-modal term; None is a term that is not used.
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
    used = [factor * term for factor, term in zip(upstream, terms, strict=True) if factor is not None]
    return torch.stack(used).sum()


def gradients_or_zeros(
    total: Tensor, inputs: Sequence[Tensor], *, keep_graph: bool = False
) -> Sequence[Tensor]:
    """The gradients of the total by the inputs, zeros by those that it does not depend on.

    With ``keep_graph`` they can be differentiated again, which the engine computes in another way.
    """
    if not (inputs and total.requires_grad):
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        total, inputs, create_graph=keep_graph, allow_unused=True, materialize_grads=True
    )


def choose_chunks(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Let the engine choose chunks of so many rows, whatever the device and the number of items."""
    patch.setattr(engine, "_FEWEST_ROWS", rows)
    patch.setattr(engine, "_CHUNK", {})
    patch.setattr(engine, "_CHUNK_ELSEWHERE", 0)


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    """Let the features seem to be on an accelerator, where reading their values would wait for it."""
    patch.setattr(Tensor, "is_cpu", False)
    patch.setattr(torch, "equal", None)  # a call would be an error


@st.composite
def rows_of_a_process(draw: st.DrawFn, n: int) -> slice:
    """Neighbouring rows of n, one at least, as one of several processes has them."""
    first = draw(st.integers(0, n - 1))
    return slice(first, draw(st.integers(first + 1, n)))


@settings(max_examples=80)
@given(
    drawn=batches(),
    options=drawn_options.options(is_streamed),
    modalities_of_teacher=st.sampled_from([(), (), (IMAGE, TEXT), (IMAGE,), (TEXT,)]),
    wanted_terms=st.sampled_from(
        [(True,) * 3] * 3 + [(True, False, False), (False, True, False), (True, False, True)]
    ),
    upstream=st.sampled_from(UPSTREAMS),
    needs_gradient=st.just([True] * 5) | st.lists(st.booleans(), min_size=5, max_size=5),
    is_one_of_several_processes=st.booleans(),
    chunk_size=st.integers(1, 12),
    keep_graph=st.booleans(),
    can_read=st.booleans(),
    data=st.data(),
)
def test_the_pass_is_the_definition_in_value_and_in_every_gradient(
    drawn: Drawn,
    options,
    modalities_of_teacher,
    wanted_terms,
    upstream,
    needs_gradient,
    is_one_of_several_processes,
    chunk_size,
    keep_graph,
    can_read,
    data,
) -> None:
    """The definition is ``rankloss.dense``, which computes whole matrices and leaves derivatives to autograd.

    Under any upstream values, in chunks of an option or of the engine's choice, with and without a graph of
    the gradients, and on a device on which reading a value would wait. The engine computes each of these in
    its own way.
    """
    n = len(drawn.image)
    # The first does not go with a teacher, the second not without one.
    excluded_option = "fixed_reference" if modalities_of_teacher else "reference_scale"
    rank_options = RankOptions(**{**options, excluded_option: None})
    if modalities_of_teacher:
        # A teacher of one modality has no cross-modal term, so the in-modal term is always wanted.
        contrastive, cross_modal, _ = wanted_terms
        wanted_terms = (contrastive, cross_modal and len(modalities_of_teacher) == 2, True)
    rows = data.draw(rows_of_a_process(n)) if is_one_of_several_processes else None
    of_both_modalities = teacher_of(n, duplicates=1)
    teacher = {name: of_both_modalities[name] for name in modalities_of_teacher}
    batch = engine_batch(drawn, rows, teacher, needs_gradient)
    inputs = [x for x in batch.inputs if x is not None and x.requires_grad]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=DEVICE)
    owed_terms = dense.terms(batch, rank_options, weights, wanted_terms)
    owed_gradients = gradients_or_zeros(weighted(owed_terms, upstream), inputs)
    with pytest.MonkeyPatch.context() as patch:
        choose_chunks(patch, chunk_size)
        if not can_read:
            forbid_reading(patch)
        terms = weighted_terms(batch, rank_options, WEIGHTS, wanted_terms)
        gradients = gradients_or_zeros(weighted(terms, upstream), inputs, keep_graph=keep_graph)
    assert_close([*terms, *gradients], [*owed_terms, *owed_gradients], tolerance=1e-9)


@pytest.mark.parametrize("n", [7, 17, 65])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_equal_items_tie_exactly_whatever_the_products_rounding(n: int, has_teacher: bool) -> None:
    """The value is that of NumPy's oracle, which sums every product in one order, so that equal items tie.

    A matrix product rounds the columns of equal items differently where they fall on a kernel's edge. Chunks
    of several sizes have several edges; items that were not tied would change the value by far more than
    float32's rounding.
    """
    inputs = random_batch(seed=n, n=n, d=5, scale=10.0, duplicates=3).leaves(torch.float32)
    teacher = teacher_of(n=n, d=13, duplicates=3) if has_teacher else {}
    arrays = [x.detach().double().cpu().numpy() for x in inputs]  # the same float32 values, in float64
    teacher_arrays = {name: x.cpu().numpy() for name, x in teacher.items()}
    cross_modal = reference.cross_modal(*arrays, **teacher_arrays)
    in_modal = reference.in_modal(*arrays, **teacher_arrays)
    values = [rankloss.RankConsistency(chunk_size=size)(*inputs, **teacher) for size in (1, 2, n)]
    assert_close(values, [cross_modal + in_modal] * 3, tolerance=1e-6)


# --- cost --------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products by their multiplications (torch's own counter passes over those in place)."""

    multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.mm.out):
            self._count(*args[:2])
        elif func == aten.addmm_.default:
            _, *factors = args  # the sum that the product is added to
            self._count(*factors)
        return func(*args, **(kwargs or {}))

    def _count(self, a: Tensor, b: Tensor) -> None:
        self.multiplications += a.numel() * b.shape[1]

    def of_all_pairs(self, n: int, d: int) -> float:
        """The number of products of two matrices of n rows, or as many multiplications in parts."""
        return self.multiplications / (n * n * d)


FORWARD_AND_BACKWARD = 4 + 4  # the matrices S, Sᵀ, I and X; as many for the gradients
COMPUTED_AGAIN = 4  # the four matrices in the backward pass, where the forward pass keeps none


@pytest.mark.parametrize(
    ("chunk_size", "chosen_chunk", "largest_kept", "products"),
    [
        pytest.param(None, 8, 32, FORWARD_AND_BACKWARD, id="small enough to be kept"),
        pytest.param(None, 8, 31, FORWARD_AND_BACKWARD + COMPUTED_AGAIN, id="too large to be kept"),
        pytest.param(None, 32, 31, FORWARD_AND_BACKWARD, id="all rows are one chunk"),
        pytest.param(32, 8, 31, FORWARD_AND_BACKWARD, id="all rows are one chunk of the option"),
        pytest.param(8, 32, 32, FORWARD_AND_BACKWARD + COMPUTED_AGAIN, id="chunks of the option"),
    ],
)
@pytest.mark.parametrize(
    ("teachers_width", "products_of_teacher"), [(None, 0), (8, 4)], ids=["no teacher", "teacher"]
)
def test_a_step_computes_similarities_again_in_chunks_of_an_option_or_beyond_what_is_kept(
    monkeypatch,
    chunk_size: int | None,
    chosen_chunk: int,
    largest_kept: int,
    products: int,
    teachers_width: int | None,
    products_of_teacher: int,
) -> None:
    """``chosen_chunk`` is the engine's choice of rows; matrices of ``largest_kept`` rows at most are kept.

    ``products`` and ``products_of_teacher`` count products of two matrices of all features.
    """
    n, d = 32, 8
    choose_chunks(monkeypatch, chosen_chunk)
    monkeypatch.setattr(engine, "_KEPT", largest_kept**2)
    loss = rankloss.RankClipLoss(schedule="constant", chunk_size=chunk_size)
    teacher = {} if teachers_width is None else teacher_of(n, teachers_width)
    with Products() as counted:
        value = loss(*random_batch(seed=0, n=n, d=d, scale=10.0).leaves(), **teacher)
        (3.0 * value).backward()
    assert counted.of_all_pairs(n, d) == products + products_of_teacher


# Products of two matrices of features that the values take.
OF_BOTH_DIRECTIONS = 2  # S and Sᵀ, in CLIP's loss and in the cross-modal term, which RankClipLoss shares
OF_IMAGES_ALONE = 1  # S, in SigLIP's loss
OF_BOTH_MODALITIES = 2  # I and X, in the in-modal term
LOSSES: dict[str, tuple[Any, int]] = {
    "clip": (lambda: rankloss.ClipLoss(memory_budget=0), OF_BOTH_DIRECTIONS),
    "siglip": (lambda: rankloss.SigLipLoss(memory_budget=0), OF_IMAGES_ALONE),
    "rankclip": (
        lambda: rankloss.RankClipLoss(schedule="constant"),
        OF_BOTH_DIRECTIONS + OF_BOTH_MODALITIES,
    ),
    "ranks": (lambda: rankloss.RankConsistency(), OF_BOTH_DIRECTIONS + OF_BOTH_MODALITIES),
    "bins": (lambda: rankloss.RankConsistency(method="bin", bins=8, in_modal=0.0), OF_BOTH_DIRECTIONS),
    "top_one": (lambda: rankloss.RankConsistency(model="top_one", cross_modal=0.0), OF_BOTH_MODALITIES),
}
"""Losses that are streamed, with the products that their values take."""


@pytest.mark.parametrize(
    ("mode", "has_graph"),
    [(torch.no_grad, True), (torch.inference_mode, True), (torch.enable_grad, False)],
    ids=["no_grad", "inference_mode", "features without a graph"],
)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:logit_bias is not given")
def test_without_gradients_only_values_are_computed(name: str, mode: Any, has_graph: bool) -> None:
    """No product of a backward pass is computed: the count is that of the values, and they are the same."""
    n, d = 32, 8
    build, products = LOSSES[name]
    inputs = random_batch(seed=0, n=n, d=d, scale=10.0).leaves()
    expected = build()(*inputs)
    if not has_graph:
        inputs = tuple(x.detach() for x in inputs)
    with mode(), Products() as counted:
        value = build()(*inputs)
    assert counted.of_all_pairs(n, d) == products
    assert torch.equal(value, expected)
    assert not value.requires_grad


def memory_of_step(n: int, chunk_size: int | None, options: Any, has_teacher: bool) -> tuple[int, int]:
    """Of n pairs the bytes that forward keeps for backward, and the elements of both's largest tensor."""
    inputs = random_batch(seed=0, n=n, d=8, scale=10.0).leaves(torch.float32)
    teacher = teacher_of(n, duplicates=1) if has_teacher else {}
    loss = rankloss.RankClipLoss(schedule="constant", chunk_size=chunk_size, **options)
    kept = saved_bytes(lambda: loss(*inputs, **teacher))
    with TensorSizes() as sizes:
        loss(*inputs, **teacher).backward()
    return kept, sizes.largest


@pytest.mark.parametrize(("options", "has_teacher"), with_teachers(STREAMED))
def test_memory_grows_linearly_in_n(options, has_teacher: bool) -> None:
    """What is kept for the backward pass, and the largest tensor of a step in chunks of four rows."""
    kept_of_32, _ = memory_of_step(32, chunk_size=4, options=options, has_teacher=has_teacher)
    kept_of_128, largest_of_128 = memory_of_step(128, chunk_size=4, options=options, has_teacher=has_teacher)
    assert 0 < kept_of_128 <= 4 * kept_of_32  # of four times the rows
    bytes_of_a_matrix = torch.float32.itemsize * 128**2
    assert kept_of_128 < bytes_of_a_matrix
    chunk_of_two_matrices = 2 * 4 * 128  # as large as the features, [128, 8]
    assert largest_of_128 == chunk_of_two_matrices


def test_a_matrix_of_the_whole_batch_is_seen_in_the_memory_where_there_is_one() -> None:
    """So the test above can fail: a small batch without chunks is computed from whole matrices."""
    _, largest = memory_of_step(128, chunk_size=None, options={}, has_teacher=False)
    assert largest >= 128**2


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [options for options in STREAMED if "model" not in options])
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_scores_too_large_for_float64_sums_give_no_number(options, scale: float) -> None:
    """Of Plackett–Luce, whose sums of e^x overflow where a score, the scale times a cosine, is beyond 709."""
    inputs = random_batch(seed=1, n=12, d=3, scale=scale).leaves()
    rank_terms_alone = (False, True, True)
    _, *terms = weighted_terms(Batch.of(*inputs), RankOptions(**options), WEIGHTS, rank_terms_alone)
    assert not torch.stack(terms).isfinite().any()


# --- on an accelerator ------------------------------------------------------------------------------------

FIVE_LATER = [*CHANGES[5:], *CHANGES[:5]]
TWO_OPTIONS = [together({**one, **other}) for one, other in zip(CHANGES, FIVE_LATER, strict=True)]
"""Each option with the one five places later in the table, where the two go together."""


@pytest.mark.parametrize(("options", "has_teacher"), with_teachers([{}, *CHANGES, *TWO_OPTIONS]))
def test_a_step_on_an_accelerator_never_waits_for_it_and_copies_the_weights_alone_to_it(
    options, has_teacher: bool
) -> None:
    """A tensor without values stands for one on an accelerator: reading a value is an error.

    Without a teacher the scale is a number; with two options the anchors are some of the rows, as in one of
    several processes.
    """
    rank_options = RankOptions(**options)
    v, t = (torch.empty(32, 8, device="meta", requires_grad=True) for _ in range(2))
    teacher = tuple(torch.empty(32, 5, device="meta") for _ in range(2)) if has_teacher else (None, None)
    scale = torch.empty((), device="meta") if has_teacher else 10.0
    rows: dict[str, Any] = {}
    has_two_options = len(options) == 2
    if has_two_options and is_streamed(rank_options):
        rows = {"anchors": (v[:16], t[:16]), "first_row": 4}
    all_terms = (True, True, True)
    with meta_is(CUDA) as copies:
        batch = Batch.of(v, t, scale, teacher=teacher, **rows)
        terms = weighted_terms(batch, rank_options, WEIGHTS, all_terms)
        shape = (32,) if rank_options.reduction == "none" else ()
        assert {(term.device, term.shape) for term in terms} == {(CUDA, shape)}
        torch.stack(terms).sum().backward()
        assert {v.grad.device, t.grad.device} == {CUDA}
    assert copies == ["aten._to_copy.default"]  # one copy, of WEIGHTS
