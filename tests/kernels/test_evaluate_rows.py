from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lists import Lists, random_lists
from torch import Tensor

from rankloss.kernels import evaluate_rows, rows
from rankloss.ranking import quantize

METHODS = [{"method": "sort"}, {"method": "bin", "bins": 40}]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    {"discount": "log"},
    {"diagonal": False},
    {"diagonal": False, "top_k": 3, "discount": "log"},
]
MEANS: list[dict[str, Any]] = [
    {"mean": True},
    {"mean": True, "discount": "log", "top_k": 5},
    {"mean": True, "diagonal": False, "discount": "log"},
]


def assert_agrees(lists: Lists, **options: Any) -> None:
    cross_entropy, nll, gradient = lists.run(**options)
    wanted_cross_entropy, wanted_nll, wanted_gradient = lists.expected(**options)
    # A score is a float32 relative to the row's largest. Where a value or gradient comes out near 0, as of a
    # leading own pair or of a list that is ordered as its reference, these roundings are all that is left.
    N, rounding = lists.cosines.shape[-1], lists.rounding
    assert (cross_entropy is None) == (lists.alpha is None)
    if cross_entropy is not None:
        assert_close(cross_entropy, wanted_cross_entropy, 1e-5, max(1e-6, rounding))
    assert_close(nll, wanted_nll, 1e-5, max(1e-6, N * rounding))
    assert gradient is not None
    assert_close(gradient, wanted_gradient, 1e-4, max(1e-6, N**0.5 * rounding))


def assert_close(found: Tensor, wanted: Tensor, relative: float, absolute: float) -> None:
    """By norm: within the larger of a part of the wanted value and an absolute error."""
    assert (found - wanted).norm() <= max(relative * float(wanted.norm()), absolute)


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
@pytest.mark.parametrize("options", [*OPTIONS, *MEANS], ids=str)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_agrees_with_float64_at_clips_scales(
    scale: float, options: dict[str, Any], method: dict[str, Any]
) -> None:
    assert_agrees(random_lists(2, 150, scale, duplicates=5), **method, **options)


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
@pytest.mark.parametrize("N", [2, 3, 127, 129, 301])
def test_agrees_for_every_length(N: int, method: dict[str, Any]) -> None:
    assert_agrees(random_lists(min(N, 2), N, 100.0), **method)
    assert_agrees(random_lists(1, N, 14.3, weights=False), **method, diagonal=False)


@st.composite
def short_lists(draw: st.DrawFn) -> Lists:
    """Lists with ties everywhere, of which many are exact, and with the own pair anywhere."""
    N = draw(st.integers(2, 9))
    n = draw(st.integers(1, 2))
    levels = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 1e-30, 0.25, 1.0])
    entry = st.one_of(levels, st.floats(-1, 1, width=32))
    block = st.lists(st.lists(entry, min_size=N, max_size=N), min_size=n, max_size=n)
    cosines, reference = (torch.tensor(draw(block), dtype=torch.float32) for _ in range(2))
    scale = draw(st.sampled_from([1.0, 14.3, 100.0]))
    return Lists(cosines, reference, scale, draw(st.integers(0, N - n)), alpha=torch.tensor(0.3))


@settings(max_examples=25)
@given(short_lists(), st.sampled_from(METHODS), st.sampled_from(OPTIONS))
def test_agrees_with_float64_for_any_short_list(
    lists: Lists, method: dict[str, Any], options: dict[str, Any]
) -> None:
    assert_agrees(lists, **method, **options)


def test_scores_200_nats_apart_neither_overflow_nor_underflow() -> None:
    x = torch.linspace(-1, 1, 60).expand(2, 60).contiguous()
    lists = Lists(x, -x, 100.0, alpha=torch.tensor(1.0))
    for method in METHODS:
        assert_agrees(lists, **method)  # the worst order: each denominator is dominated by its first item


def all_equal(N: int) -> Tensor:
    return torch.full((1, N), 0.25)


def outlier(N: int) -> Tensor:
    return torch.cat([-torch.ones(1), torch.linspace(0, 1e-6, N - 1)])[None]


def two_clusters(N: int) -> Tensor:
    return torch.cat([torch.linspace(0, 1e-5, N // 2), 1 + torch.linspace(0, 1e-3, N - N // 2)])[None]


@pytest.mark.parametrize("make", [all_equal, outlier, two_clusters])
def test_rows_with_deep_buckets_are_merged_and_exact(make: Any) -> None:
    N = 210
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    lists = random_lists(1, N, 100.0).replace(reference=make(N)[:, order].contiguous())
    assert deepest_bucket(lists.reference) > rows._DEEPEST
    for options in ({}, {"top_k": 9, "diagonal": False}):
        assert_agrees(lists, **options)


def deepest_bucket(reference: Tensor) -> int:
    return int(quantize(reference, reference.shape[1]).flatten().bincount().max())


@pytest.mark.parametrize("options", [{}, {"diagonal": False, "discount": "log"}], ids=str)
def test_merging_gives_the_same_bits_as_comparing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = random_lists(2, 150, 14.3, duplicates=20)
    compared = lists.run(**options)
    monkeypatch.setattr(rows, "_DEEPEST", 1)
    merged = lists.run(**options)
    for a, b in zip(compared, merged, strict=True):
        assert a is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_the_gradient_has_the_same_bits_in_whatever_order_items_come(method: dict[str, Any]) -> None:
    """As when atomic operations are carried out in another order."""
    N = 150
    lists = random_lists(1, N, 14.3, weights=False).replace(first_row=0)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(N - 1)])
    moved = lists.replace(cosines=lists.cosines[:, order], reference=lists.reference[:, order])
    gradient, of_moved = lists.run(**method)[2], moved.run(**method)[2]
    assert gradient is not None
    assert of_moved is not None
    assert torch.equal(gradient[:, order], of_moved)


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
@pytest.mark.parametrize("where", ["cosines", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other(method: dict[str, Any], where: str, bad: float) -> None:
    lists = random_lists(3, 20, 14.3)
    spoiled = getattr(lists, where).clone()
    spoiled[1, 17] = bad
    for whole, part in zip(lists.run(**method), lists.replace(**{where: spoiled}).run(**method), strict=True):
        assert whole is not None
        assert part is not None
        assert part[1].isnan().all()
        assert torch.equal(part[[0, 2]], whole[[0, 2]])


def ties_of_the_best() -> Tensor:
    return torch.tensor([[0.9, 0.1, 0.9, 0.3, 0.2, 0.7, 0.1, 0.9]])


def own_pair_in_the_middle() -> Tensor:
    return torch.tensor([[0.4, 0.1, -0.5, 0.30001, 0.2, 0.7, 0.3, 0.65]])


@pytest.mark.parametrize("make", [ties_of_the_best, own_pair_in_the_middle, lambda: all_equal(8)])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("first_row", [0, 5])
def test_items_share_a_bin_of_the_kernel_exactly_where_quantize_says_so(
    make: Any, diagonal: bool, first_row: int
) -> None:
    """With equal scores the gradient says of every item with which others it is tied."""
    reference = make()
    lists = Lists(torch.zeros_like(reference), reference, 1.0, first_row)
    _, _, slopes = lists.run(method="bin", bins=5, diagonal=diagonal)
    assert slopes is not None
    listed = [q for q in range(8) if diagonal or q != first_row]
    slope, bins = slopes[0, listed], quantize(reference[0, listed], 5)
    assert torch.equal(slope[:, None] == slope, bins[:, None] == bins)


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_a_scale_that_is_not_finite_is_nan(method: dict[str, Any]) -> None:
    for found in random_lists(2, 9, math.nan).run(**method):
        assert found is not None
        assert found.isnan().all()


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_more_rows_than_programs(method: dict[str, Any]) -> None:
    lists = random_lists(11, 17, 14.3, duplicates=3)
    assert rows.choose_launch(11, 17, 0, 0).programs < 11
    assert_agrees(lists, **method)


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_rows_of_a_larger_matrix(method: dict[str, Any]) -> None:
    lists = random_lists(2, 40, 14.3)
    wide = lists.replace(
        cosines=torch.cat([lists.cosines, torch.full((2, 9), math.nan)], 1)[:, :40],
        reference=torch.cat([torch.full((2, 5), math.nan), lists.reference], 1)[:, 5:],
        first_equal=torch.arange(40, dtype=torch.int32),
    )
    for a, b in zip(lists.run(**method), wide.run(**method), strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_rows_of_two_matrices_one_below_the_other(method: dict[str, Any]) -> None:
    one, other = random_lists(2, 40, 14.3), random_lists(2, 40, 14.3, seed=1)
    names = ("cosines", "reference", "alpha")
    both = one.replace(**{name: torch.cat([getattr(one, name), getattr(other, name)]) for name in names})
    together = both.run(**method, anchors=2)
    for found, above, below in zip(together, one.run(**method), other.run(**method), strict=True):
        assert torch.equal(found, torch.cat([above, below]))  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_matrices_that_rank_each_other(method: dict[str, Any]) -> None:
    """Of four the first and the last, the second and the third; equal items are those of either half."""
    n, N = 3, 40
    outer, inner = (random_lists(n, N, 14.3, seed=seed, duplicates=4) for seed in (0, 1))
    blocks = (outer.cosines, inner.cosines, inner.reference, outer.reference)
    repeats = torch.arange(N).remainder(N - 4), torch.arange(N)
    alone = [
        outer.replace(cosines=x, reference=y, first_equal=repeats[k // 2])
        for k, (x, y) in enumerate(zip(blocks, reversed(blocks), strict=True))
    ]
    whole = torch.cat(blocks)
    together = outer.replace(
        cosines=whole,
        reference=whole,
        first_equal=torch.stack(repeats),
        alpha=outer.alpha.repeat(4),  # type: ignore[union-attr]
    )
    parts = zip(*(lists.run(**method) for lists in alone), strict=True)
    for found, part in zip(together.run(**method, anchors=n, opposite=True), parts, strict=True):
        assert torch.equal(found, torch.cat(part))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=["sort", "bin"])
def test_values_alone_are_those_with_the_gradient(method: dict[str, Any]) -> None:
    lists = random_lists(2, 30, 14.3)
    cross_entropy, nll, _ = lists.run(**method)
    alone = lists.run(**method, gradient=False)
    assert torch.equal(alone[0], cross_entropy)  # type: ignore[arg-type]
    assert torch.equal(alone[1], nll)
    assert alone[2] is None
    assert torch.equal(lists.replace(alpha=None).run(**method)[1], nll)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"cosines": torch.zeros(2, 4, dtype=torch.float64)}, "cosines must be float32"),
    ({"reference": torch.zeros(4)}, "reference must be float32"),
    ({"reference": torch.zeros(4, 2).T}, "reference must have contiguous columns"),
    ({"reference": torch.zeros(2, 5)}, r"one shape and device; got \(2, 4\) on cpu, \(2, 5\)"),
    ({"scale": torch.ones(1)}, r"scale must have shape \[\] on cpu; got \(1,\)"),
    ({"beta": torch.ones(3)}, r"beta must have shape \[\] or \[2\] on cpu; got \(3,\)"),
    ({"alpha": torch.ones((), dtype=torch.int64)}, "alpha must be floating point"),
    ({"first_equal": torch.zeros(4)}, "first_equal must be integer"),
    ({"first_equal": torch.zeros(3, dtype=torch.int64)}, r"first_equal must have shape \[4\]"),
    ({"first_row": 3}, "first_row must be from 0 to 2, .* got 3"),
    ({"opposite": True}, r"opposite, .* need an even number of matrices; got 1"),
    ({"first_equal": torch.zeros(2, 4, dtype=torch.int64)}, r"first_equal of shape \[2, N\], need an even"),
    ({"anchors": 3}, "anchors must divide the number of rows, 2; got 3"),
    ({"method": "merge"}, "method must be one of 'sort', 'bin'; got 'merge'"),
    ({"method": "bin", "bins": 1}, "bins must be from 2"),
    ({"top_k": 0}, "top_k must be at least 1; got 0"),
    ({"discount": "exp"}, "discount must be one of None, 'log'; got 'exp'"),
    ({"cosines": torch.zeros(1, 1), "reference": torch.zeros(1, 1)}, "2 to 131,072 columns; got 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    zeros, one = torch.zeros(2, 4), torch.ones(())
    with pytest.raises(ValueError, match=message):
        evaluate_rows(**{"cosines": zeros, "reference": zeros, "scale": one, "beta": one, **changes})
