"""Seeds to numbers: intervals, paired tests against a reference, and the verdict on a difference.

Everything is about the variation between training seeds. The held-out items are the same for every seed, so
an interval says where the mean over more seeds would be, not what other items would give.
"""

import dataclasses
import gc
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
# With two seeds the interval reaches 12.7 standard errors to either side (one degree of freedom) and rests on
# normality alone: it is shown, but nothing is concluded from it.
MIN_SEEDS = 3
# A bootstrap that draws few seeds is too narrow: with four it was often narrower than the seeds' t-interval.
MIN_SEEDS_OVER_PICTURES = 8

BETTER = "better"
WORSE = "worse"
NOT_SIGNIFICANT = "no significant difference"
TOO_FEW_SEEDS = "too few seeds"

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None  # half of the t-interval's width; None for a single seed
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval, or the mean where there is none."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval, or the mean where there is none."""
        return self.mean + (self.half_width or 0.0)


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference to a reference, with its test."""

    p: float | None = None  # of the two-sided paired t-test; None for one seed, or without any spread
    adjusted: float | None = None  # after Holm's correction; None until corrected

    @property
    def nominal(self) -> bool:
        """True if it would pass as the only test."""
        return self.n >= MIN_SEEDS and self.p is not None and self.p < ALPHA

    @property
    def established(self) -> bool:
        """True if it passes after the correction."""
        return self.n >= MIN_SEEDS and self.adjusted is not None and self.adjusted < ALPHA


def _tested(values: Sequence[float]) -> Difference:
    """Return mean, interval and the test of a mean of zero.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("values: at least one is needed, got none")
    if not np.isfinite(array).all():
        raise ValueError(f"values: must be finite, got {array.tolist()}")
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return Difference(mean, None, n)
    # A spread that is only rounding error cannot be tested.
    if np.ptp(array) <= 1e-12 * max(1.0, float(np.abs(array).max())):
        return Difference(mean, 0.0, n)
    test = stats.ttest_1samp(array, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.high - interval.low) / 2, n, float(test.pvalue))


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and 95 % t-interval of one value per seed.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    found = _tested(values)
    return Estimate(found.mean, found.half_width, found.n)


def paired_difference(values: Mapping[Any, float], reference: Mapping[Any, float]) -> Difference | None:
    """Return the mean difference over the seeds that both have, not yet corrected; None without any."""
    # Sorted, so that rounding does not depend on the order of the records.
    common = sorted(set(values) & set(reference), key=repr)
    return _tested([values[seed] - reference[seed] for seed in common]) if common else None


def two_way(differences: np.ndarray, draws: int = 5000) -> tuple[float, float]:
    """Return the ends of a 95 % interval over seeds and pictures, both samples: a bootstrap that draws both.

    Args:
        differences: Of two arms, ``[seeds, pictures]``.
        draws: Of the bootstrap, always the same ones.
    """
    seeds, pictures = differences.shape
    rng = np.random.default_rng(0)
    sums = [
        rng.multinomial(seeds, [1 / seeds] * seeds)
        @ differences
        @ rng.multinomial(pictures, [1 / pictures] * pictures)
        for _ in range(draws)
    ]
    # An end that lies between two decimals is rounded alike on every processor: sums with whole counts are
    # exact for hits, and what is left of other values' rounding is cut.
    means = np.round(np.divide(sums, seeds * pictures), 9)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def correct(family: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Adjust the differences of one exhibit together, by Holm's step-down procedure.

    A difference with fewer than MIN_SEEDS seeds claims nothing, so it is not part of the family.
    """
    tested = {key: d.p for key, d in family.items() if d.p is not None and d.n >= MIN_SEEDS}
    gc.freeze()  # statsmodels collects garbage at every call, which takes 0.25 s where torch is loaded
    holm = multipletests(list(tested.values()), method="holm")[1].tolist() if tested else []
    gc.unfreeze()
    adjusted = dict(zip(tested, holm, strict=True))
    return {key: dataclasses.replace(d, adjusted=adjusted.get(key)) for key, d in family.items()}


def verdict(difference: Difference | None, *, above: str = BETTER, below: str = WORSE) -> str:
    """Return the verdict on a corrected difference; without a difference it is that of too few seeds.

    ``above`` and ``below`` are the words for established differences of either sign.
    """
    if difference is None or difference.n < MIN_SEEDS:
        return TOO_FEW_SEEDS
    if not difference.established:
        return NOT_SIGNIFICANT
    return above if difference.mean > 0 else below


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a record, the mean of several where it is a list."""

    title: str
    path: tuple[str, ...]  # below the record's metrics
    digits: int = 2

    def __call__(self, record: Mapping[str, Any]) -> float:
        """Return the number."""
        found = reduce(getitem, self.path, record["metrics"])
        return fmean(found) if isinstance(found, list) else float(found)


Pair = tuple[Any, Any]  # an arm minus another
Read = Callable[[Mapping[str, Any]], float | None]


class Arms:
    """Records by arm and seed: means over the seeds, and differences that are paired by them."""

    def __init__(self, records: Mapping[Any, Mapping[int, Mapping[str, Any]]]) -> None:
        self.records = records

    @property
    def all(self) -> list[Mapping[str, Any]]:
        """All records."""
        return [record for of in self.records.values() for record in of.values()]

    def values(self, arm: Any, read: Read) -> dict[int, float]:
        """Return a number by seed, where a record has it."""
        found = {seed: read(record) for seed, record in self.records[arm].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, arm: Any, read: Read) -> Estimate | None:
        """Return the mean over the seeds; None without any."""
        values = self.values(arm, read)
        return estimate(list(values.values())) if values else None

    def difference(self, pair: Pair, read: Read) -> Difference | None:
        """Return the paired difference, not corrected; None if the arms share no seed."""
        return paired_difference(*(self.values(arm, read) for arm in pair))

    def over_pictures(
        self, pair: Pair, read: Callable[[Mapping[str, Any]], np.ndarray]
    ) -> tuple[float, float] | None:
        """Return the interval over seeds and pictures of a difference of what records have by picture.

        None with fewer common seeds than ``MIN_SEEDS_OVER_PICTURES``.
        """
        mine, others = (self.records[arm] for arm in pair)
        common = sorted(set(mine) & set(others))
        if len(common) < MIN_SEEDS_OVER_PICTURES:
            return None
        return two_way(np.stack([read(mine[seed]) - read(others[seed]) for seed in common]))

    def tests(self, pairs: Iterable[Pair], measures: Iterable[Measure]) -> dict[tuple[Pair, str], Difference]:
        """Return the differences by pair and measure's title, corrected together.

        The arms of every pair have a common seed.
        """
        measures = list(measures)
        return correct({(pair, m.title): self.difference(pair, m) for pair in pairs for m in measures})
