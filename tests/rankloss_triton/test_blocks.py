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
from blocks_oracle import definition
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


# Weights of the cross-entropies and the likelihoods of two matrices; None leaves the former out.
Weights = tuple[tuple[float, float] | None, tuple[float, float]]
ALONE, BOTH, PARTLY = (None, (0.7, 0.3)), ((0.4, 0.2), (0.7, 0.3)), ((0.4, 0), (0, 0.3))


def block_of(cosines: Tensor, scale: float, weights: Weights = BOTH, **fields: Any) -> Block:
    """Two matrices, in which no two items are equal."""
    own = torch.arange(cosines.shape[-1])
    alpha, beta = (None if w is None else torch.tensor(w, dtype=torch.float64) for w in weights)
    block = Block(cosines, torch.tensor(scale), alpha, beta, None, (own, own), 0)
    return block._replace(**fields)


def random_block(
    n: int, N: int, scale: float, weights: Weights = BOTH, *, teacher: bool = False, seed: int = 0
) -> Block:
    """Some rows of S and R, whose last items repeat earlier ones, and one of which is zero."""
    generator = torch.Generator().manual_seed(seed)
    image, text, *others = (
        F.normalize(torch.randn(N, 32, generator=generator), dim=-1) for _ in range(4 if teacher else 2)
    )
    repeated, first_equal = min(5, N // 3), torch.arange(N)
    for x in (image, text, *others, first_equal):
        x[N - repeated :] = x[:repeated]
    image[N // 2] = 0
    first_row = (N - n) // 2
    chosen = slice(first_row, first_row + n)
    ranked_by = others or [image, text]

    def products(v: Tensor, t: Tensor) -> Tensor:
        return torch.stack([v[chosen] @ t.T, t[chosen] @ v.T])

    return block_of(
        products(image, text),
        scale,
        weights,
        first_row=first_row,
        reference=products(*ranked_by) if teacher else None,
        first_equal=(first_equal,) * 2,
    )


def run(block: Block, with_gradient: bool = True, **options: Any) -> Evaluated:
    """The kernel's values, on the CPU."""
    block = tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, block)
    found = rankloss_triton.evaluate(block, RankOptions(**options), with_gradient=with_gradient)
    return Evaluated(*(None if x is None else x.cpu() for x in found))


def assert_agrees(block: Block, **options: Any) -> None:
    found, wanted = run(block, **options), definition(block, RankOptions(**options))
    # A score is a float32 relative to the row's largest: four roundings (2⁻²⁴ each) of the widest span. Where
    # a value comes out near 0, as of a list that is ordered as its reference, these are all that is left.
    span = block.cosines.amax(-1) - block.cosines.amin(-1)
    N, rounding = block.cosines.shape[-1], float(span.max()) * float(block.scale) * 2.0**-22
    tolerances = ((1e-5, rounding), (1e-5, N * rounding), (1e-4, N**0.5 * rounding))
    assert (found.cross_entropy is None) == (block.alpha is None)
    for x, y, (relative, absolute) in zip(found, wanted, tolerances, strict=True):
        if x is not None:
            assert (x - y).norm() <= max(relative * float(y.norm()), absolute, 1e-6)


@methods
@pytest.mark.parametrize("options", [*OPTIONS[:2], OPTIONS[-1]], ids=str)
def test_block_is_that_of_the_definition(options: dict[str, Any], method: dict[str, Any]) -> None:
    assert_agrees(random_block(1, 140, 100.0), **method, **options)
    assert_agrees(random_block(2, 3, 14.3, teacher=True), **method, **options)


@st.composite
def short_blocks(draw: st.DrawFn) -> Block:
    """Lists with ties everywhere, of which many are exact, and with the own pair anywhere."""
    n, N = draw(st.integers(1, 2)), draw(st.integers(2, 9))
    levels = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 1e-30, 0.25, 1.0])
    entries = st.lists(st.one_of(levels, st.floats(-1, 1, width=32)), min_size=2 * n * N, max_size=2 * n * N)
    cosines, reference = (torch.tensor(draw(entries)).view(2, n, N) for _ in range(2))
    return block_of(
        cosines,
        draw(st.sampled_from([1.0, 14.3, 100.0])),
        draw(st.sampled_from([ALONE, BOTH, PARTLY])),
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
    x = torch.linspace(-1, 1, 60)[None]
    # The worst order: each denominator is dominated by its first item.
    assert_agrees(block_of(torch.stack([x, -x]), 100.0), **method)


def all_equal(N: int) -> Tensor:
    return torch.full((1, N), 0.25)


def outlier(N: int) -> Tensor:
    return torch.cat([-torch.ones(1), torch.linspace(0, 1e-6, N - 1)])[None]


@pytest.mark.parametrize("make", [all_equal, pytest.param(outlier, marks=pytest.mark.slow)])
def test_rows_with_deep_buckets_are_merged_and_exact(make: Any) -> None:
    N = 150
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    reference = make(N)[:, order]
    assert int(quantize(reference, N).flatten().bincount().max()) > rows._DEEPEST
    block = random_block(1, N, 100.0, teacher=True)._replace(reference=torch.stack([reference, -reference]))
    assert_agrees(block)


@methods
def test_the_gradient_has_the_same_bits_in_whatever_order_items_come(method: dict[str, Any]) -> None:
    """As when atomic operations are carried out in another order."""
    N = 60
    block = random_block(1, N, 14.3, ALONE, teacher=True)._replace(
        first_row=0, first_equal=(torch.arange(N),) * 2
    )
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(N - 1)])
    moved = block._replace(
        cosines=block.cosines[..., order].contiguous(), reference=block.reference[..., order].contiguous()
    )
    gradient, of_moved = run(block, **method).gradient, run(moved, **method).gradient
    assert torch.equal(gradient[..., order], of_moved)


@pytest.mark.parametrize(("method", "bad"), [(METHODS["sort"], math.nan), (METHODS["bin"], math.inf)])
def test_a_row_that_is_not_finite_is_nan_and_no_other(method: dict[str, Any], bad: float) -> None:
    block = random_block(2, 9, 14.3, teacher=True)
    for name in ("cosines", "reference"):
        spoiled = getattr(block, name).clone()
        spoiled[0, 1, 2] = bad
        for found in run(block._replace(**{name: spoiled}), **method):
            assert found[0, 1].isnan().all()
            assert found[0, 0].isfinite().all()
            assert found[1].isfinite().all()
    for found in run(block._replace(scale=torch.tensor(math.nan)), **method):
        assert found.isnan().all()


@pytest.mark.parametrize(
    "reference", [[0.9, 0.1, 0.9, 0.3, 0.2, 0.7, 0.1, 0.9], [0.4, 0.1, -0.5, 0.30001, 0.2, 0.7, 0.3, 0.65]]
)
@pytest.mark.parametrize("diagonal", [True, False])
def test_items_share_a_bin_of_the_kernel_exactly_where_quantize_says_so(
    reference: list[float], diagonal: bool
) -> None:
    """With equal scores the gradient says of every item with which others it is tied."""
    y = torch.tensor([[reference], [reference]])
    block = block_of(torch.zeros_like(y), 1.0, ALONE, reference=y, first_row=5)
    slopes = run(block, method="bin", bins=5, diagonal=diagonal).gradient
    listed = [q for q in range(8) if diagonal or q != 5]
    slope, bins = slopes[0, 0, listed], quantize(y[0, 0, listed], 5)
    assert torch.equal(slope[:, None] == slope, bins[:, None] == bins)


@methods
def test_an_expanded_weight_and_cosines_that_are_strided_are_read_as_they_are(method: dict[str, Any]) -> None:
    block = random_block(2, 9, 14.3, teacher=True)
    weight = torch.tensor(0.3, dtype=torch.float64).expand(2)
    strided = block.cosines.transpose(1, 2).contiguous().transpose(1, 2)
    none_equal = (None, block.first_equal[1])
    assert_agrees(
        block._replace(cosines=strided, alpha=weight, beta=weight, first_equal=none_equal), **method
    )


@methods
def test_values_alone_are_those_with_the_gradient(method: dict[str, Any]) -> None:
    block = random_block(2, 20, 14.3)
    found, alone = run(block, **method), run(block, with_gradient=False, **method)
    assert alone.gradient is None
    torch.testing.assert_close(found._replace(gradient=None), alone, rtol=0, atol=0)
