from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from batches import VECTORS, random_batch, unit, vector_batch
from fake_devices import no_float64
from measures import MEASURES_OF_LISTS, MEASURES_WITH_MASK
from rankloss import metrics


@st.composite
def two_lists(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two lists of one length, each with ties."""
    n = draw(st.integers(2, 40))
    numbers = st.lists(st.integers(0, n), min_size=n, max_size=n)
    return draw(numbers), draw(numbers)


@given(two_lists())
def test_spearman_is_scipys_ties_included_and_nan_where_all_are_tied(
    lists: tuple[list[int], list[int]],
) -> None:
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in lists)
    if all_are_tied(lists[0]) or all_are_tied(lists[1]):
        owed = math.nan
    else:
        owed = scipy.stats.spearmanr(x, y).statistic
    assert metrics.spearman_rho(x, y).item() == pytest.approx(owed, abs=1e-12, nan_ok=True)


def all_are_tied(numbers: Sequence[float]) -> bool:
    return len(set(numbers)) == 1


# --- graded lists -------------------------------------------------------------------------------------------


def padded(lists: list[list[float]], fill: float) -> torch.Tensor:
    """One matrix, whose rows are the lists, filled up to one place more than the longest has."""
    width = 1 + max(map(len, lists))
    return torch.tensor([x + [fill] * (width - len(x)) for x in lists], dtype=torch.float64)


@st.composite
def graded_lists(draw: st.DrawFn) -> list[tuple[list[float], list[float]]]:
    """Some lists, each as its scores and its grades, both with ties; some are −∞."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    grade = st.one_of(st.integers(0, 3).map(float), st.just(-math.inf))
    score = st.one_of(st.integers(-3, 3).map(float), st.just(-math.inf))
    return [
        (draw(st.lists(score, min_size=n, max_size=n)), draw(st.lists(grade, min_size=n, max_size=n)))
        for n in sizes
    ]


def assert_each(
    measure: Callable[..., Any], lists: Any, owed: Callable[[Any, Any], float], **options: Any
) -> None:
    """Each list has the value ``owed(scores, grades)``, alone and beside others in a padded matrix."""
    scores, grades = ([*x] for x in zip(*lists, strict=True))
    is_item = padded([[1.0] * len(x) for x in scores], fill=0.0) > 0
    # Padding has scores and grades above all others: whoever reads it gets another value.
    together = measure(padded(scores, fill=7.0), padded(grades, fill=5.0), mask=is_item, **options)
    alone = [measure(torch.tensor(x), torch.tensor(y), **options).item() for x, y in lists]
    owed_values = [owed(x, y) for x, y in lists]
    assert together.dtype == torch.float64
    assert together.tolist() == pytest.approx(owed_values, abs=1e-12, nan_ok=True)
    assert alone == pytest.approx(owed_values, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("variant", ["b", "c"])
@given(graded_lists())
def test_kendalls_tau_is_scipys(variant: Any, lists: Any) -> None:
    def owed(scores: list[float], grades: list[float]) -> float:
        if all_are_tied(scores) or all_are_tied(grades):
            return math.nan
        x, y = map(scipy.stats.rankdata, (scores, grades))  # of infinities SciPy makes NaN
        return scipy.stats.kendalltau(x, y, variant=variant).statistic

    assert_each(metrics.kendall_tau, lists, owed, variant=variant)


@given(graded_lists())
def test_pairwise_accuracy_is_the_share_of_pairs_in_the_grades_order(lists: Any) -> None:
    """A pair of equal scores is half right."""

    def owed(scores: list[float], grades: list[float]) -> float:
        items = range(len(grades))
        pairs = [(better, worse) for better in items for worse in items if grades[better] > grades[worse]]
        right = sum(scores[better] > scores[worse] for better, worse in pairs)
        tied = sum(scores[better] == scores[worse] for better, worse in pairs)
        return (right + tied / 2) / len(pairs) if pairs else math.nan

    assert_each(metrics.pairwise_accuracy, lists, owed)


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@given(graded_lists(), st.sampled_from([None, 1, 3]))
def test_ndcg_is_scikit_learns(gain: Any, lists: Any, k: int | None) -> None:
    def owed(scores: list[float], grades: list[float]) -> float:
        gains = [max(grade, 0.0) for grade in grades]  # −∞ gains nothing
        if gain == "exponential":
            gains = [2**linear - 1 for linear in gains]
        if not any(gains):
            return math.nan
        ranked = scipy.stats.rankdata(scores)  # scikit-learn takes no infinities
        return sklearn.metrics.ndcg_score([gains], [ranked], k=k)

    assert_each(metrics.ndcg, lists, owed, k=k, gain=gain)


@pytest.mark.parametrize(
    "grades", [[2000, 1999, 0, 1998], [3, 1, 0, 2], [9001, 1, 9000, 9000], [60, 59, 1, 0]], ids=str
)
def test_exponential_gains_of_large_grades_are_exact(grades: list[int]) -> None:
    """float64 does not hold 2^2000, and rounds 2^60 − 1: the gains owed are of Python's integers.

    They are divided by 2 to the largest grade, which changes no ratio of gains, and so no NDCG.
    """
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2])
    gains = [float(Fraction(2**grade - 1, 2 ** max(grades))) for grade in grades]
    owed = sklearn.metrics.ndcg_score([gains], scores[None].numpy(), k=3)
    value = metrics.ndcg(scores, torch.tensor(grades), gain="exponential", k=3)
    assert value.item() == pytest.approx(owed, rel=1e-14)


def test_ndcg_of_a_list_without_a_gain_is_nan() -> None:
    scores, grades = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.zeros(4, dtype=torch.int64)
    assert metrics.ndcg(scores, grades, gain="exponential", k=3).isnan()


@given(graded_lists())
def test_reciprocal_rank_is_that_of_the_first_relevant_item(lists: Any) -> None:
    """Of items with equal scores the worst comes first, and an item is relevant from grade 2 on."""

    def owed(scores: list[float], grades: list[float]) -> float:
        order = sorted(range(len(scores)), key=lambda item: (-scores[item], grades[item]))
        ranks = [rank for rank, item in enumerate(order, start=1) if grades[item] >= 2]
        return 1 / ranks[0] if ranks else math.nan

    assert_each(metrics.reciprocal_rank, lists, owed, at_least=2.0)


every_measure = pytest.mark.parametrize("name", MEASURES_OF_LISTS)  # of two lists, by name


@every_measure
def test_integers_that_float64_rounds_are_refused(name: str) -> None:
    """From 2⁵³ on neighbours become equal, which would be a tie."""
    large = torch.tensor([1, 2**53 + 1, 2**53 + 1])
    reason = r"(x|y|grades) must be at most 2⁵³, to stay distinct.* 9007199254740993"
    with pytest.raises(ValueError, match=reason):
        MEASURES_OF_LISTS[name](torch.tensor([1, 2, 3]), large)


@every_measure
def test_a_device_without_float64_refuses_integers_that_float32_rounds(name: str) -> None:
    large = torch.tensor([2**24 + 1, 2, 3])
    reason = r"(x|scores) must be at most 2²⁴, to stay distinct.*float32.* 16777217"
    with no_float64(), pytest.raises(ValueError, match=reason):
        MEASURES_OF_LISTS[name](large, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", MEASURES_WITH_MASK)
def test_padding_may_have_integers_that_float64_rounds(name: str) -> None:
    """Such integers are refused in a list, see above."""
    large, mask = torch.tensor([1, 2**53 + 1, 2**53 + 1]), torch.tensor([True, False, False])
    assert MEASURES_WITH_MASK[name](torch.tensor([1, 2, 3]), large, mask=mask).shape == ()


@every_measure
def test_dtypes_that_no_float_holds_are_refused(name: str) -> None:
    x = torch.tensor([3.0, 2.0, 1.0])
    unsigned = torch.tensor([2**64 - 1, 2**64 - 2, 5], dtype=torch.uint64)
    reason = r"(grades|y) must hold floating-point numbers, or integers up to int64.* torch.uint64"
    with pytest.raises(ValueError, match=reason):
        MEASURES_OF_LISTS[name](x, unsigned)
    with pytest.raises(ValueError, match=r"(scores|x) must hold floating-point numbers.* torch.complex64"):
        MEASURES_OF_LISTS[name](torch.complex(x, x), x)


@every_measure
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.float16])
def test_other_dtypes_are_taken_as_their_numbers(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([3.0, 2.0, 1.0])
    assert torch.equal(MEASURES_OF_LISTS[name](x, x.to(dtype)), MEASURES_OF_LISTS[name](x, x))


@every_measure
def test_booleans_are_taken_as_0_and_1(name: str) -> None:
    x = torch.tensor([3.0, 2.0, 1.0])
    assert torch.equal(MEASURES_OF_LISTS[name](x, x > 1), MEASURES_OF_LISTS[name](x, (x > 1).double()))


@every_measure
def test_leading_dimensions_are_lists(name: str) -> None:
    measure = MEASURES_OF_LISTS[name]
    x, grades = torch.rand(2, 3, 4, 21, generator=torch.Generator().manual_seed(0))
    y = (3 * grades**4).floor()  # 0, 1 and 2, most are 0
    list_by_list = [[measure(x[i, j], y[i, j]) for j in range(4)] for i in range(3)]
    assert len({float(value) for row in list_by_list for value in row}) > 2  # so that each has its own
    torch.testing.assert_close(measure(x, y), torch.tensor(list_by_list, dtype=torch.float64))


def test_equal_modalities_agree_perfectly() -> None:
    batch = random_batch(seed=0, n=50, d=8, scale=1.0)
    for value in metrics.rank_agreement(batch.image, batch.image).values():
        assert value.item() == pytest.approx(1)


def test_few_anchors_are_rows_at_even_distances_from_the_first_to_the_last() -> None:
    v, t = unit(50, 8, seed=0), unit(50, 8, seed=1)
    rows = [0, 16, 33, 49]  # 49/3 apart, but for rounding
    owed = metrics.kendall_tau((v @ v.T)[rows], (t @ t.T)[rows]).mean()
    sampled = metrics.rank_agreement(v, t, max_anchors=4)
    assert sampled["in_modal_tau"].item() == pytest.approx(owed.item(), abs=1e-12)


class RoundedProducts(TorchFunctionMode):
    """Matrix products with another rounding in each column, as some devices have: it breaks ties."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_product = getattr(func, "__name__", "") in ("matmul", "__matmul__")
        return result + 1e-12 * torch.arange(result.shape[-1]) if is_product else result


@pytest.mark.parametrize("n", [7, 17, 65])
def test_equal_items_are_tied_whatever_the_products_rounding(n: int) -> None:
    batch = random_batch(seed=n, n=n, d=5, scale=1.0, duplicates=3)
    v, t = batch.image, batch.text

    def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a·bᵀ, entry by entry, which rounds equal columns alike."""
        return (a[:, None] * b).sum(-1)

    across, within = (products(v, t), products(t, v)), (products(v, v), products(t, t))
    owed = {
        "cross_modal_tau": metrics.kendall_tau(*across).nanmean().item(),
        "cross_modal_rho": metrics.spearman_rho(*across).nanmean().item(),
        "in_modal_tau": metrics.kendall_tau(*within).nanmean().item(),
        "in_modal_rho": metrics.spearman_rho(*within).nanmean().item(),
    }
    with RoundedProducts():
        agreement = metrics.rank_agreement(v, t)
    assert {name: value.item() for name, value in agreement.items()} == pytest.approx(owed, abs=1e-12)


def test_alignment_and_uniformity_match_the_published_analysis_scripts_values() -> None:
    """Both numbers are that script's, in float64, for this batch of six pairs."""
    batch = vector_batch(VECTORS["0:6:4:10"])
    assert metrics.alignment(batch.image, batch.text).item() == pytest.approx(2.49989752858144, rel=1e-12)
    assert metrics.uniformity(batch.image, batch.text).item() == pytest.approx(-1.97326705984705, rel=1e-12)


def test_uniformity_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    n, rows_of_a_chunk = 23, 4
    batch = random_batch(seed=0, n=n, d=5, scale=1.0)
    whole = metrics.uniformity(batch.image, batch.text)
    monkeypatch.setattr(metrics.features, "_BLOCK", n * rows_of_a_chunk)
    torch.testing.assert_close(metrics.uniformity(batch.image, batch.text), whole, rtol=1e-12, atol=0)


def test_modality_gap_is_the_distance_of_the_centres() -> None:
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # around (2, 3)
    t = torch.tensor([[0.0, 0.0], [-2.0, -2.0]])  # around (−1, −1)
    assert metrics.modality_gap(v, t).item() == pytest.approx(5)  # √(3² + 4²)
