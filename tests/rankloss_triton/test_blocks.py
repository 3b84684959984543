"""Blocks of lists: values and gradients of the kernels against the definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import rankloss_triton
from blocks_oracle import terms_and_gradient_by_definition
from devices import DEVICE
from interpreter import few_examples
from rankloss import RankOptions
from rankloss.ranking import quantize
from rankloss_triton import rows
from rankloss_triton.rows import Block, Evaluated

METHODS: dict[str, dict[str, Any]] = {"sort": {}, "bin": {"method": "bin", "bins": 40}}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    {"diagonal": False},
    {"diagonal": False, "top_k": 3, "reduction": "sum"},
]


# Weights α of the cross-entropies and β of the likelihoods of two matrices; None leaves the former out.
Weights = tuple[tuple[float, float] | None, tuple[float, float]]
LIKELIHOODS_ALONE: Weights = (None, (0.7, 0.3))
BOTH: Weights = ((0.4, 0.2), (0.7, 0.3))
ONE_OF_EACH_MATRIX: Weights = ((0.4, 0), (0, 0.3))


def block_of(cosines: Tensor, scale: float, weights: Weights = BOTH, **fields: Any) -> Block:
    """A block of two matrices ``[2, n, N]`` without a teacher, in which no two items are equal.

    Other fields of the block may be given.
    """
    each_its_own = torch.arange(cosines.shape[-1])
    alpha, beta = (None if w is None else torch.tensor(w, dtype=torch.float64) for w in weights)
    block = Block(
        cosines=cosines,
        scale=torch.tensor(scale),
        alpha=alpha,
        beta=beta,
        reference=None,
        first_equal=(each_its_own, each_its_own),
        first_row=0,
    )
    return block._replace(**fields)


def random_block(
    *, n: int, N: int, scale: float, weights: Weights = BOTH, teacher: bool = False, seed: int = 0
) -> Block:
    """n of the N rows of both cross-modal matrices; the last items repeat earlier ones, one image is zero."""
    generator = torch.Generator().manual_seed(seed)
    repeated = min(5, N // 3)
    first_equal = torch.arange(N)
    first_equal[N - repeated :] = first_equal[:repeated]

    def features() -> Tensor:
        return F.normalize(torch.randn(N, 32, generator=generator), dim=-1)[first_equal]

    image, text = features(), features()
    image[N // 2] = 0
    first_row = (N - n) // 2
    anchors = slice(first_row, first_row + n)

    def similarities(v: Tensor, t: Tensor) -> Tensor:
        return torch.stack([v[anchors] @ t.T, t[anchors] @ v.T])

    return block_of(
        similarities(image, text),
        scale,
        weights,
        first_row=first_row,
        reference=similarities(features(), features()) if teacher else None,
        first_equal=(first_equal,) * 2,
    )


def evaluated(block: Block, with_gradient: bool = True, **options: Any) -> Evaluated:
    """The kernel's values and gradient of a block, computed on the device and brought back to the CPU."""
    on_device = tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, block)
    results = rankloss_triton.evaluate(on_device, RankOptions(**options), with_gradient=with_gradient)
    return Evaluated(*(None if result is None else result.cpu() for result in results))


def assert_agrees(block: Block, **options: Any) -> None:
    """Values and gradient of the kernel are those of the definition, to float32's rounding."""
    cross_entropy, nll, gradient = evaluated(block, **options)
    rank_options = RankOptions(**options)
    owed_cross_entropy, owed_nll, owed_gradient = terms_and_gradient_by_definition(block, rank_options)
    # A score is a float32 relative to the row's largest: four roundings (2⁻²⁴ each) of the widest span. Where
    # a value comes out near 0, as of a list that is ordered as its reference, these are all that is left.
    span = block.cosines.amax(-1) - block.cosines.amin(-1)
    rounding = float(span.max()) * float(block.scale) * 2.0**-22
    N = block.cosines.shape[-1]  # the terms of a likelihood, and the entries of a row's gradient
    assert (cross_entropy is None) == (block.alpha is None)
    if cross_entropy is not None:
        assert_near(cross_entropy, owed_cross_entropy, relative=1e-5, absolute=rounding)
    assert_near(nll, owed_nll, relative=1e-5, absolute=N * rounding)
    assert_near(gradient, owed_gradient, relative=1e-4, absolute=N**0.5 * rounding)


def assert_near(of_kernel: Tensor | None, owed: Tensor, *, relative: float, absolute: float) -> None:
    """The error's norm is within one of the tolerances, or 1e-6 where both are less."""
    assert of_kernel is not None
    assert (of_kernel - owed).norm() <= max(relative * float(owed.norm()), absolute, 1e-6)


@methods
@pytest.mark.parametrize("options", [*OPTIONS[:2], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize(
    "block",
    [random_block(n=1, N=140, scale=100.0), random_block(n=2, N=3, scale=14.3, teacher=True)],
    ids=["long", "by a teacher"],
)
def test_block_is_that_of_the_definition(
    options: dict[str, Any], method: dict[str, Any], block: Block
) -> None:
    assert_agrees(block, **method, **options)


@st.composite
def short_blocks(draw: st.DrawFn) -> Block:
    """Lists with ties everywhere, of which many are exact, and with the own pair anywhere."""
    n, N = draw(st.integers(1, 2)), draw(st.integers(2, 9))
    size = 2 * n * N  # of two matrices
    levels = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 1e-30, 0.25, 1.0])
    entries = st.lists(st.one_of(levels, st.floats(-1, 1, width=32)), min_size=size, max_size=size)
    cosines, reference = (torch.tensor(draw(entries)).view(2, n, N) for _ in range(2))
    return block_of(
        cosines,
        draw(st.sampled_from([1.0, 14.3, 100.0])),
        draw(st.sampled_from([LIKELIHOODS_ALONE, BOTH, ONE_OF_EACH_MATRIX])),
        first_row=draw(st.integers(0, N - n)),
        reference=draw(st.sampled_from([None, reference])),
    )


@few_examples(8)
@given(short_blocks(), st.sampled_from(list(METHODS.values())), st.sampled_from(OPTIONS))
def test_any_short_block_is_that_of_the_definition(
    block: Block, method: dict[str, Any], options: dict[str, Any]
) -> None:
    assert_agrees(block, **method, **options)


@methods
def test_scores_200_nats_apart_neither_overflow_nor_underflow(method: dict[str, Any]) -> None:
    cosines = torch.linspace(-1, 1, 60)[None]
    # The worst order: each denominator is dominated by its first item.
    opposite = torch.stack([cosines, -cosines])
    assert_agrees(block_of(opposite, scale=100.0), **method)


def all_equal(N: int) -> Tensor:
    return torch.full((1, N), 0.25)


def one_far_from_the_others(N: int) -> Tensor:
    return torch.cat([-torch.ones(1), torch.linspace(0, 1e-6, N - 1)])[None]


@pytest.mark.parametrize(
    "make_reference", [all_equal, pytest.param(one_far_from_the_others, marks=pytest.mark.slow)]
)
def test_rows_with_deep_buckets_are_merged_and_exact(make_reference: Any) -> None:
    """A bucket is a part of a row's range: one of few items is sorted in place, a deeper one is merged."""
    N = 150
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    reference = make_reference(N)[:, order]
    items_of_buckets = quantize(reference, N).flatten().bincount()
    assert int(items_of_buckets.max()) > rows._DEEPEST  # or the row is not merged
    block = random_block(n=1, N=N, scale=100.0, teacher=True)._replace(
        reference=torch.stack([reference, -reference])
    )
    assert_agrees(block)


@methods
def test_the_gradient_has_the_same_bits_in_whatever_order_items_come(method: dict[str, Any]) -> None:
    """Atomic operations may be carried out in any order; items in another order stand in for that.

    The cross-entropy is left out: it adds up the items in their order.
    """
    N = 60
    block = random_block(n=1, N=N, scale=14.3, weights=LIKELIHOODS_ALONE, teacher=True)
    # first_equal and first_row are places, which would have to move with the items: so each item is its own
    # first, and the own pair stays in place 0. Equal values remain, as ties.
    block = block._replace(first_row=0, first_equal=(torch.arange(N),) * 2)
    order_of_others = 1 + torch.randperm(N - 1, generator=torch.Generator().manual_seed(1))
    order = torch.cat([torch.zeros(1, dtype=torch.int64), order_of_others])
    reordered = block._replace(
        cosines=block.cosines[..., order].contiguous(), reference=block.reference[..., order].contiguous()
    )
    gradient, of_reordered = evaluated(block, **method).gradient, evaluated(reordered, **method).gradient
    assert torch.equal(gradient[..., order], of_reordered)


@pytest.mark.parametrize(
    ("method", "bad"),
    [(METHODS["sort"], math.nan), (METHODS["bin"], math.inf)],
    ids=["NaN when sorted", "infinity when binned"],
)
@pytest.mark.parametrize("field", ["cosines", "reference"])
def test_a_row_that_is_not_finite_is_nan_and_no_other(method: dict[str, Any], bad: float, field: str) -> None:
    block = random_block(n=2, N=9, scale=14.3, teacher=True)
    spoilt = getattr(block, field).clone()
    spoilt[0, 1, 2] = bad
    for result in evaluated(block._replace(**{field: spoilt}), **method):
        first_matrix, second_matrix = result
        good_row, bad_row = first_matrix
        assert bad_row.isnan().all()
        assert good_row.isfinite().all()
        assert second_matrix.isfinite().all()


@methods
def test_a_scale_that_is_nan_makes_all_rows_nan(method: dict[str, Any]) -> None:
    block = random_block(n=2, N=9, scale=14.3, teacher=True)
    for result in evaluated(block._replace(scale=torch.tensor(math.nan)), **method):
        assert result.isnan().all()


@pytest.mark.parametrize(
    "reference",
    [[0.9, 0.1, 0.9, 0.3, 0.2, 0.7, 0.1, 0.9], [0.4, 0.1, -0.5, 0.30001, 0.2, 0.7, 0.3, 0.65]],
    ids=["equal references", "references on the edges of bins"],
)
@pytest.mark.parametrize("diagonal", [True, False])
def test_items_share_a_bin_of_the_kernel_exactly_where_quantize_says_so(
    reference: list[float], diagonal: bool
) -> None:
    """With equal scores the gradients of items are equal exactly where the items are tied."""
    own, number_of_bins = 5, 5
    of_two_matrices = torch.tensor([[reference], [reference]])
    scores = torch.zeros_like(of_two_matrices)
    block = block_of(scores, 1.0, LIKELIHOODS_ALONE, reference=of_two_matrices, first_row=own)
    gradient = evaluated(block, method="bin", bins=number_of_bins, diagonal=diagonal).gradient
    assert gradient is not None
    listed = [item for item in range(len(reference)) if diagonal or item != own]
    by_item = gradient[0, 0, listed]
    bins = quantize(of_two_matrices[0, 0, listed], number_of_bins)
    have_equal_gradients, share_a_bin = by_item[:, None] == by_item, bins[:, None] == bins
    assert torch.equal(have_equal_gradients, share_a_bin)


@methods
def test_an_expanded_weight_is_read_as_it_is(method: dict[str, Any]) -> None:
    weight = torch.tensor(0.3, dtype=torch.float64).expand(2)
    assert weight.stride() == (0,)  # one number in memory for both matrices
    block = random_block(n=2, N=9, scale=14.3, teacher=True)
    assert_agrees(block._replace(alpha=weight, beta=weight), **method)


@methods
def test_cosines_that_are_strided_are_read_as_they_are(method: dict[str, Any]) -> None:
    block = random_block(n=2, N=9, scale=14.3, teacher=True)
    strided = block.cosines.transpose(1, 2).contiguous().transpose(1, 2)
    assert_agrees(block._replace(cosines=strided), **method)


@methods
def test_one_matrix_may_have_no_equal_items(method: dict[str, Any]) -> None:
    block = random_block(n=2, N=9, scale=14.3, teacher=True)
    assert_agrees(block._replace(first_equal=(None, block.first_equal[1])), **method)


@methods
def test_values_alone_are_those_with_the_gradient(method: dict[str, Any]) -> None:
    block = random_block(n=2, N=20, scale=14.3)
    with_gradient, values_alone = evaluated(block, **method), evaluated(block, with_gradient=False, **method)
    torch.testing.assert_close(values_alone, with_gradient._replace(gradient=None), rtol=0, atol=0)
