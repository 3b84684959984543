"""Records of the test to differences, paired by seed, corrected as planned, and the plan's decision."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct_planned, estimate, paired_difference

from . import plan
from .plan import ARMS, BASELINES, COMPARISONS, MEAN, PRIMARY, START, Find, Pair, Plan, Search


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows."""

    searches: dict[str, Search]
    records: dict[str, dict[int, Record]]  # of the test, by arm and seed
    missing: int  # trainings of the test
    tests: dict[tuple[str, Pair], Difference]  # by measure; complete comparisons alone

    def estimate(self, arm: str, measure: str) -> Estimate | None:
        """Return a measure's mean over the arm's seeds."""
        of = self.records[arm]
        return estimate([of[seed]["metrics"][measure] for seed in sorted(of)]) if of else None

    def helps(self, arm: str) -> bool:
        """Return True where the mean of both measures is above each baseline's, after the correction."""
        found = [self.tests.get((MEAN, (arm, other))) for other in BASELINES]
        return all(d is not None and d.established and d.mean > 0 for d in found)


def findings(sizes: Plan, find: Find) -> Findings:
    """Return the comparisons whose trainings are all there.

    The correction counts every planned test; one that cannot be stated yet has p = 1. What is kept and what
    is learned are corrected together, and their mean apart.
    """
    searches = plan.searches(sizes, find)
    settings = plan.tests(sizes, searches)
    records = {
        arm: {one.seed: record for one, record in find(settings.get(arm, ())).items()}
        for arm in (START, *ARMS)
    }
    n = len(sizes.seeds)

    def corrected(measures: Sequence[str]) -> dict[tuple[str, Pair], Difference]:
        planned = dict.fromkeys(itertools.product(measures, COMPARISONS), n)
        known = {}
        for measure, pair in planned:
            values = [{seed: one["metrics"][measure] for seed, one in records[arm].items()} for arm in pair]
            if all(len(of) == n for of in values):
                known[measure, pair] = paired_difference(*values)
        return correct_planned(planned, known)

    missing = n * (1 + len(ARMS)) - sum(map(len, records.values()))
    return Findings(searches, records, missing, {**corrected(PRIMARY), **corrected((MEAN,))})
