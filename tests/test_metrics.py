from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import VECTORS, random_batch, vector_batch
from fake_devices import no_float64
from measures import LISTS
from rankloss import metrics

pair_of_lists = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, n), min_size=n, max_size=n)] * 2)
)


@given(pair_of_lists)
def test_spearman_matches_scipy_ties_included(lists: tuple[list[int], list[int]]) -> None:
    x, y = (torch.tensor(v, dtype=torch.float64) for v in lists)
    if len(set(lists[0])) == 1 or len(set(lists[1])) == 1:
        assert metrics.spearman_rho(x, y).isnan()
        return
    assert metrics.spearman_rho(x, y).item() == pytest.approx(
        scipy.stats.spearmanr(x, y).statistic, abs=1e-12
    )


# --- graded lists -------------------------------------------------------------------------------------------


def padded(lists: list[list[float]], fill: float) -> torch.Tensor:
    width = 1 + max(map(len, lists))
    return torch.tensor([x + [fill] * (width - len(x)) for x in lists], dtype=torch.float64)


@st.composite
def graded_lists(draw: st.DrawFn) -> list[tuple[list[float], list[float]]]:
    """Scores and grades with ties; some are −∞."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    grade = st.one_of(st.integers(0, 3).map(float), st.just(-math.inf))
    score = st.one_of(st.integers(-3, 3).map(float), st.just(-math.inf))
    return [
        (draw(st.lists(score, min_size=n, max_size=n)), draw(st.lists(grade, min_size=n, max_size=n)))
        for n in sizes
    ]


def of_each(measure: Callable[..., Any], lists: Any, **options: Any) -> list[float]:
    """Values of lists that are padded to one length."""
    scores, grades = zip(*lists, strict=True)
    mask = padded([[1.0] * len(x) for x in scores], 0.0) > 0
    found = measure(padded(list(scores), 7.0), padded(list(grades), 5.0), mask=mask, **options)
    alone = [measure(torch.tensor(x), torch.tensor(y), **options).item() for x, y in lists]
    assert found.tolist() == pytest.approx(alone, abs=1e-12, nan_ok=True)
    assert found.dtype == torch.float64
    return alone


@given(graded_lists())
def test_kendalls_taus_are_scipys(lists: Any) -> None:
    for variant in ("b", "c"):
        for found, (x, y) in zip(of_each(metrics.kendall_tau, lists, variant=variant), lists, strict=True):
            if len(set(x)) == 1 or len(set(y)) == 1:
                assert math.isnan(found)
            else:
                x, y = map(scipy.stats.rankdata, (x, y))  # of infinities SciPy makes NaN
                assert found == pytest.approx(
                    scipy.stats.kendalltau(x, y, variant=variant).statistic, abs=1e-12
                )


@given(graded_lists())
def test_pairwise_accuracy_counts_pairs(lists: Any) -> None:
    for found, (x, y) in zip(of_each(metrics.pairwise_accuracy, lists), lists, strict=True):
        pairs = [(p, q) for p in range(len(y)) for q in range(len(y)) if y[p] > y[q]]
        right = [1.0 if x[p] > x[q] else 0.5 if x[p] == x[q] else 0.0 for p, q in pairs]
        assert found == pytest.approx(sum(right) / len(right) if pairs else math.nan, abs=1e-12, nan_ok=True)


@given(graded_lists(), st.sampled_from([None, 1, 3]))
def test_ndcg_is_scikit_learns(lists: Any, k: int | None) -> None:
    for gain in ("linear", "exponential"):
        for found, (x, y) in zip(of_each(metrics.ndcg, lists, k=k, gain=gain), lists, strict=True):
            gains = [max(g, 0.0) if gain == "linear" else 2 ** max(g, 0.0) - 1 for g in y]
            if any(gains):
                ranked = scipy.stats.rankdata(x)  # scikit-learn takes no infinities
                assert found == pytest.approx(sklearn.metrics.ndcg_score([gains], [ranked], k=k), abs=1e-12)
            else:
                assert math.isnan(found)


def test_exponential_gains_of_large_grades_are_exact() -> None:
    """2^2000 is no float64, and 2^60 − 1 is rounded: integers have both."""
    rows = [[2000, 1999, 0, 1998], [3, 1, 0, 2], [0, 0, 0, 0], [9001, 1, 9000, 9000], [60, 59, 1, 0]]
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    found = metrics.ndcg(scores.expand(5, 4), torch.tensor(rows), gain="exponential", k=3)
    for value, row in zip(found.tolist(), rows, strict=True):
        gains = [float(Fraction(2**g - 1, 2 ** max(row))) for g in row]
        owed = sklearn.metrics.ndcg_score([gains], scores.numpy(), k=3) if any(row) else math.nan
        assert value == pytest.approx(owed, rel=1e-14, nan_ok=True)


@given(graded_lists())
def test_reciprocal_rank_is_that_of_the_first_relevant_item(lists: Any) -> None:
    for found, (x, y) in zip(of_each(metrics.reciprocal_rank, lists, at_least=2.0), lists, strict=True):
        order = sorted(range(len(x)), key=lambda i: (-x[i], y[i]))  # the worst of equal scores first
        ranks = [1 / (1 + r) for r, i in enumerate(order) if y[i] >= 2]
        assert found == pytest.approx(ranks[0] if ranks else math.nan, nan_ok=True)


@pytest.mark.parametrize("name", LISTS)
def test_integers_that_a_float_rounds_are_refused(name: str) -> None:
    small, large = torch.tensor([1, 2, 3]), torch.tensor([1, 2**53 + 1, 2**53 + 1])
    with pytest.raises(
        ValueError, match=r"(x|y|grades) must be at most 2⁵³, to stay distinct.* 9007199254740993"
    ):
        LISTS[name](small, large)
    with (
        no_float64(),
        pytest.raises(
            ValueError, match=r"(x|scores) must be at most 2²⁴, to stay distinct.*float32.* 16777217"
        ),
    ):
        LISTS[name](torch.tensor([2**24 + 1, 2, 3]), small)
    if name != "spearman_rho":
        mask = torch.tensor([True, False, False])
        assert LISTS[name](small, large, mask=mask).shape == ()  # padding may hold anything


@pytest.mark.parametrize("name", LISTS)
def test_dtypes_that_no_float_holds_are_refused(name: str) -> None:
    x, y = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2**64 - 1, 2**64 - 2, 5], dtype=torch.uint64)
    with pytest.raises(
        ValueError,
        match=r"(grades|y) must hold floating-point numbers, or integers up to int64.* torch.uint64",
    ):
        LISTS[name](x, y)
    with pytest.raises(ValueError, match=r"(scores|x) must hold floating-point numbers.* torch.complex64"):
        LISTS[name](torch.complex(x, x), x)
    expected = LISTS[name](x, x)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.float16):
        assert torch.equal(LISTS[name](x, x.to(dtype)), expected)
    assert torch.equal(LISTS[name](x, x > 1), LISTS[name](x, (x > 1).double()))


def test_leading_dimensions_are_lists() -> None:
    x, y = torch.rand(2, 3, 4, 21, generator=torch.Generator().manual_seed(0))
    rho = metrics.spearman_rho(x, y)
    assert rho.shape == (3, 4)
    torch.testing.assert_close(rho[1, 2], metrics.spearman_rho(x[1, 2], y[1, 2]))


def test_equal_modalities_agree_perfectly_and_a_sample_of_anchors_is_taken_when_asked() -> None:
    batch = random_batch(0, 50, 8, 1.0)
    for value in metrics.rank_agreement(batch.image, batch.image).values():
        assert value.item() == pytest.approx(1)
    ends = metrics.kendall_tau(*((x @ x.T)[[0, 49]] for x in (batch.image, batch.text)))
    sampled = metrics.rank_agreement(batch.image, batch.text, max_anchors=2)
    assert sampled["in_modal_tau"].item() == pytest.approx(ends.mean().item(), abs=1e-12)


@pytest.mark.parametrize("n", [7, 17, 65])
def test_equal_items_are_tied_whatever_the_products_rounding(n: int) -> None:
    batch = random_batch(n, n, 5, 1.0, duplicates=3)
    v, t = batch.image, batch.text
    pairs = {
        # Products that round equal columns alike.
        "cross_modal": ((v[:, None] * t).sum(-1), (t[:, None] * v).sum(-1)),
        "in_modal": ((v[:, None] * v).sum(-1), (t[:, None] * t).sum(-1)),
    }
    actual = metrics.rank_agreement(v, t)
    for term, (a, b) in pairs.items():
        for name, measure in (("tau", metrics.kendall_tau), ("rho", metrics.spearman_rho)):
            expected = measure(a, b).nanmean().item()
            assert actual[f"{term}_{name}"].item() == pytest.approx(expected, abs=1e-12)


def test_alignment_and_uniformity_match_the_published_analysis_scripts_values() -> None:
    batch = vector_batch(VECTORS["0:6:4:10"])
    assert metrics.alignment(batch.image, batch.text).item() == pytest.approx(2.49989752858144, rel=1e-12)
    assert metrics.uniformity(batch.image, batch.text).item() == pytest.approx(-1.97326705984705, rel=1e-12)


def test_uniformity_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(0, 23, 5, 1.0)
    whole = metrics.uniformity(batch.image, batch.text)
    monkeypatch.setattr(metrics.features, "_BLOCK", 23 * 4)
    torch.testing.assert_close(metrics.uniformity(batch.image, batch.text), whole, rtol=1e-12, atol=0)


def test_modality_gap_is_the_distance_of_the_centres() -> None:
    v, t = (torch.tensor(x) for x in ([[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [-2.0, -2.0]]))
    assert metrics.modality_gap(v, t).item() == pytest.approx(5)
