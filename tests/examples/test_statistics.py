"""The miniature's statistics against other ways to compute them, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW
from studies import statistics
from studies.statistics import Difference, correct, estimate, paired_difference, two_way, verdict

# Hundredths, as accuracies on finite sets are: ties and equal differences do occur.
scores = st.integers(0, 10_000).map(lambda n: n / 100)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match=r"^values: "):
        estimate(values)


def test_one_seed_has_no_interval():
    found = estimate([12.5])
    assert (found.mean, found.half_width, found.n) == (12.5, None, 1)
    assert found.low == found.high == 12.5


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=10))
def test_the_paired_difference_is_scipys_and_its_interval_the_t_interval(pairs):
    values, reference = map(np.array, zip(*pairs, strict=True))
    assume(np.ptp(values - reference) > 1e-6)  # equal differences have no p: a test of their own is below
    found = paired_difference(dict(enumerate(values)), dict(enumerate(reference)))
    assert found.p == pytest.approx(stats.ttest_rel(values, reference).pvalue, rel=1e-6, abs=1e-12)
    interval = DescrStatsW(values - reference).tconfint_mean(0.05)
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-6)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=10))
def test_a_paired_difference_is_the_estimate_of_the_differences(pairs):
    values, reference = map(np.array, zip(*pairs, strict=True))
    assume(np.ptp(values - reference) > 1e-6)
    found = paired_difference(dict(enumerate(values)), dict(enumerate(reference)))
    alone = estimate(values - reference)
    assert (alone.mean, alone.low, alone.high, alone.n) == (found.mean, found.low, found.high, len(pairs))


# --- many tests ---


@given(p_values)
def test_holm_steps_down_from_the_smallest(values):
    """Each p times the number of hypotheses from its rank on, never below an earlier one, and at most 1."""
    family = {i: Difference(mean=1.0, half_width=0.1, n=5, p=p) for i, p in enumerate(values)}
    adjusted = [difference.adjusted for difference in correct(family).values()]
    largest = 0.0
    for rank, i in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        assert adjusted[i] == pytest.approx(largest)


# --- verdicts ---


@given(st.lists(st.lists(st.tuples(scores, scores), min_size=1, max_size=6), min_size=1, max_size=6))
def test_nothing_is_claimed_whose_interval_holds_zero(rows):
    for difference in corrected(rows):
        claim = verdict(difference)
        if claim in ("better", "worse"):
            assert difference.low > 0 if claim == "better" else difference.high < 0


@pytest.mark.parametrize("mean", [-1.0, 1.0])
def test_two_seeds_prove_nothing_and_three_may(mean):
    claims = [
        verdict(Difference(mean=mean, half_width=0.1, n=n, p=1e-3, adjusted=1e-3))
        for n in (2, statistics.MIN_SEEDS)
    ]
    assert claims == [statistics.TOO_FEW_SEEDS, "better" if mean > 0 else "worse"]


@given(st.lists(st.lists(st.tuples(scores, scores), min_size=1, max_size=6), min_size=1, max_size=6))
def test_what_is_established_is_nominally_so(rows):
    for difference in corrected(rows):
        assert difference.nominal or not difference.established


def corrected(rows):
    """Return the differences of a family, corrected together, of rows of pairs of scores."""
    family = {}
    for number, pairs in enumerate(rows):
        values, reference = zip(*pairs, strict=True)
        family[number] = paired_difference(dict(enumerate(values)), dict(enumerate(reference)))
    return correct(family).values()


@given(scores, scores, st.integers(2, 8))
def test_differences_without_any_spread_prove_nothing(value, other, n):
    """A variance of zero is what the seeds happened to give, not knowledge."""
    values, reference = ({seed: score + seed for seed in range(n)} for score in (value, other))
    found = paired_difference(values, reference)
    assert found.p is None
    assert verdict(correct({0: found})[0]) in ("no significant difference", "too few seeds")


def test_an_interval_over_seeds_and_pictures_knows_both_variances():
    """Of independent effects of seeds, pictures and cells its width is that of the sum of their variances."""
    effects = drawn_effects()
    low, high = two_way(1 + effects)
    error = math.sqrt(2**2 / SEEDS + 9**2 / PICTURES + 3**2 / (SEEDS * PICTURES))
    # A fifth: without the part of seeds, or of pictures, the width would be 0.7 times this one.
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    assert (high + low) / 2 == pytest.approx(1 + effects.mean(), abs=0.2 * error)


def test_an_interval_over_equal_seeds_is_that_over_pictures():
    of_one_seed, *_ = drawn_effects()
    low, high = two_way(np.broadcast_to(of_one_seed, (3, PICTURES)))
    error = of_one_seed.std() / math.sqrt(PICTURES)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


SEEDS, PICTURES = 40, 900


def drawn_effects():
    """Return effects of seeds, pictures and cells with standard deviations 2, 9 and 3, added."""
    rng = np.random.default_rng(5)
    of_seeds = rng.normal(0, 2, (SEEDS, 1))
    of_pictures = rng.normal(0, 9, (1, PICTURES))
    return of_seeds + of_pictures + rng.normal(0, 3, (SEEDS, PICTURES))
