"""Seeds to numbers: intervals, paired tests against a reference, and what may be said of a difference.

Everything is about the variation between training seeds. The held-out items are the same for every seed, so
an interval says where the mean over more seeds would be, not what other items would give.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
# Two seeds have an interval, of one degree of freedom: 12.7 standard errors, all of it resting on the normal
# distribution. It is shown; nothing is concluded from it.
MIN_SEEDS = 3

BETTER = "better"
WORSE = "worse"
NOT_TOLD_APART = "not told apart"
TOO_FEW_SEEDS = "too few seeds"

Seed = Hashable
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        half_width: Half of the t-interval's width; None for a single seed.
        n: Number of seeds.
    """

    mean: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval, the mean itself where there is none."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval, the mean itself where there is none."""
        return self.mean + (self.half_width or 0.0)


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference to a reference, with its test.

    Attributes:
        p: Two-sided p of the paired t-test; None where it is not defined: one seed, or no spread at all.
        adjusted: The same after Holm's correction for everything tested with it; None until corrected.
    """

    p: float | None = None
    adjusted: float | None = None

    @property
    def nominal(self) -> bool:
        """Whether it would pass as the only test there is."""
        return self.n >= MIN_SEEDS and self.p is not None and self.p < ALPHA

    @property
    def established(self) -> bool:
        """Whether it passes after the correction."""
        return self.n >= MIN_SEEDS and self.adjusted is not None and self.adjusted < ALPHA


def _no_spread(values: np.ndarray) -> bool:
    # Differences of percentages carry the rounding of both; a variance made of nothing else tests nothing.
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval.

    Args:
        values: One value a seed.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("values: at least one is needed, got none")
    if not np.isfinite(array).all():
        raise ValueError(f"values: must be finite, got {array.tolist()}")
    n = len(array)
    if n == 1:
        return Estimate(float(array[0]), None, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(n), n)


def paired_difference(values: Mapping[Seed, float], reference: Mapping[Seed, float]) -> Difference | None:
    """Mean difference over the seeds that both have, with its interval and its paired t-test.

    Args:
        values: Value by seed.
        reference: The reference's value by seed.

    Returns:
        The difference, not yet corrected; None if no seed is in both.
    """
    # Sorted, so that the last digits do not depend on the order of the records.
    common = sorted(set(values) & set(reference), key=repr)
    if not common:
        return None
    differences = np.array([values[seed] - reference[seed] for seed in common])
    mean = estimate(differences.tolist())
    p = None
    if len(common) > 1 and not _no_spread(differences):
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean.mean, mean.half_width, mean.n, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false claim in the family stays below the level.

    Args:
        p_values: The family's p-values.

    Returns:
        Adjusted p-values in the same order.
    """
    m = len(p_values)
    adjusted = [0.0] * m
    largest = 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def correct(family: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Adjust a family of differences together.

    Only what can be concluded from is part of the family: a difference with fewer than MIN_SEEDS seeds claims
    nothing, and so costs the others nothing.

    Args:
        family: Everything that is tested in one exhibit.

    Returns:
        The same differences with ``adjusted`` filled in where there is a test.
    """
    tested = {key: d.p for key, d in family.items() if d.p is not None and d.n >= MIN_SEEDS}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {key: dataclasses.replace(d, adjusted=adjusted.get(key)) for key, d in family.items()}


def verdict(difference: Difference | None, *, above: str = BETTER, below: str = WORSE) -> str:
    """What may be said of a corrected difference.

    Args:
        difference: The difference, as :func:`correct` returns it; None if there is nothing to compare.
        above: The word for an established positive difference.
        below: The word for an established negative difference.

    Returns:
        ``above``, ``below``, ``"not told apart"`` or ``"too few seeds"``.
    """
    if difference is None or difference.n < MIN_SEEDS:
        return TOO_FEW_SEEDS
    if not difference.established:
        return NOT_TOLD_APART
    return above if difference.mean > 0 else below
