"""The miniature's statistics against other ways to compute them, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from miniature_paper import statistics
from miniature_paper.statistics import Difference, correct, estimate, paired_difference, verdict
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

# Hundredths, as accuracies on finite sets are: ties and equal differences do occur.
scores = st.integers(0, 10_000).map(lambda n: n / 100)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def by_seed(values):
    return dict(enumerate(values))


def spread(values):
    return np.ptp(values) > 1e-6


# --- intervals ---


@given(st.lists(scores, min_size=2, max_size=12))
def test_the_interval_is_the_t_interval(values):
    found = estimate(values)
    low, high = DescrStatsW(values).tconfint_mean(0.05)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_one_seed_has_no_interval():
    found = estimate([12.5])
    assert (found.mean, found.half_width, found.n) == (12.5, None, 1)
    assert found.low == found.high == 12.5


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match=r"^values: "):
        estimate(values)


# --- paired tests ---


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=10))
def test_the_paired_difference_is_scipys(pairs):
    values, reference = map(np.array, zip(*pairs, strict=True))
    assume(spread(values - reference))
    found = paired_difference(by_seed(values), by_seed(reference))
    theirs = stats.ttest_rel(values, reference)
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-6)


@given(st.dictionaries(st.integers(0, 9), scores), st.dictionaries(st.integers(0, 9), scores), st.randoms())
def test_only_common_seeds_are_paired_in_any_order(values, reference, random):
    found = paired_difference(values, reference)
    common = values.keys() & reference.keys()
    if not common:
        assert found is None
        return
    assert found.n == len(common)
    assert found.mean == pytest.approx(np.mean([values[s] - reference[s] for s in common]))
    shuffled = list(values.items())
    random.shuffle(shuffled)
    assert paired_difference(dict(shuffled), reference) == found


# --- many tests ---


@given(p_values)
def test_holm_steps_down_from_the_smallest(values):
    """Each p times the number of hypotheses from its rank on, never below an earlier one, and at most 1."""
    family = {i: Difference(1.0, 0.1, 5, p) for i, p in enumerate(values)}
    adjusted = [d.adjusted for d in correct(family).values()]
    largest = 0.0
    for rank, i in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        assert adjusted[i] == pytest.approx(largest)


def test_what_cannot_be_tested_costs_the_others_nothing():
    good = Difference(1.0, 0.1, 5, p=0.01)
    few = Difference(1.0, 0.1, 2, p=0.04)
    flat = Difference(1.0, 0.0, 5, p=None)
    corrected = correct({"good": good, "few": few, "flat": flat})
    assert corrected["good"].adjusted == 0.01
    assert corrected["few"].adjusted is None
    assert corrected["flat"].adjusted is None


@pytest.mark.slow
def test_the_family_wise_error_stays_below_the_level():
    """As in Table 1: all differences share the reference's noise, and nothing differs."""
    rng = np.random.default_rng(1)
    families, false = 200, 0
    for _ in range(families):
        clip = by_seed(rng.normal(10, 1, 5))
        others = rng.normal(10, 1, (12, 5))
        family = {i: paired_difference(by_seed(row), clip) for i, row in enumerate(others)}
        false += any(d.established for d in correct(family).values())
    assert false / families <= 0.05 + 3 * (0.05 * 0.95 / families) ** 0.5


# --- verdicts ---


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Difference(1.0, 0.5, 5, 0.001, 0.04), "better"),
        (Difference(-1.0, 0.5, 5, 0.001, 0.04), "worse"),
        (Difference(1.0, 0.5, 5, 0.001, 0.05), "not told apart"),
        (Difference(1.0, 0.5, 5, None, None), "not told apart"),
        (Difference(1.0, 0.5, 2, 0.001, 0.001), "too few seeds"),
        (None, "too few seeds"),
    ],
)
def test_verdicts(difference, said):
    assert verdict(difference) == said
    words = {"better": "larger", "worse": "smaller"}
    assert verdict(difference, above="larger", below="smaller") == words.get(said, said)


@given(st.lists(st.lists(st.tuples(scores, scores), min_size=1, max_size=6), min_size=1, max_size=6))
def test_nothing_is_claimed_whose_interval_holds_zero(rows):
    family = {}
    for number, pairs in enumerate(rows):
        values, reference = zip(*pairs, strict=True)
        family[number] = paired_difference(by_seed(values), by_seed(reference))
    for difference in correct(family).values():
        said = verdict(difference)
        if said in ("better", "worse"):
            assert difference.n >= statistics.MIN_SEEDS
            assert (difference.low > 0) if said == "better" else (difference.high < 0)
        if difference.established:
            assert difference.nominal


@given(scores, scores, st.integers(2, 8))
def test_differences_without_any_spread_prove_nothing(value, other, n):
    """A variance of zero is what the seeds happened to give, not knowledge."""
    found = paired_difference({s: value + s for s in range(n)}, {s: other + s for s in range(n)})
    assert found.p is None
    assert verdict(correct({0: found})[0]) in ("not told apart", "too few seeds")
