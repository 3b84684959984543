"""Records of the test to differences, paired by seed, corrected as planned, and the plan's decision."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct_planned, estimate, paired_difference

from . import plan
from .plan import ARMS, CLIP, COMPARISONS, NEAR_CLIP, NEAR_ORDERS, ORDERS, Find, Pair, Plan, Search


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows."""

    searches: dict[str, dict[str, Search]]  # by data set and arm
    records: dict[str, dict[str, dict[int, Record]]]  # by data set, arm and seed
    missing: int  # trainings of the test, of all data sets
    tests: dict[tuple[str, Pair], Difference]  # in R@10; complete comparisons alone
    others: dict[tuple[str, Pair], Difference]  # in the data set's secondary measure

    def estimate(self, data: str, arm: str, measure: str) -> Estimate | None:
        """Return a measure's mean over the arm's seeds."""
        of = self.records[data][arm]
        return estimate([of[seed]["metrics"][measure] for seed in sorted(of)]) if of else None

    def above(self, data: str, arm: str, other: str) -> bool:
        """Return True where an arm's R@10 is above another's after the correction."""
        found = self.tests.get((data, (arm, other)))
        return found is not None and found.established and found.mean > 0


def findings(sizes: Plan, finds: Mapping[str, Find]) -> Findings:
    """Return the comparisons whose trainings are all there.

    The correction counts every planned test; one that cannot be stated yet has p = 1.
    """
    searches = {data: plan.searches(sizes, data, find) for data, find in finds.items()}
    records: dict[str, dict[str, dict[int, Record]]] = {}
    for data, find in finds.items():
        settings = plan.arms(sizes, searches[data])
        records[data] = {
            arm: {one.seed: record for one, record in find(settings.get(arm, ())).items()} for arm in ARMS
        }
    n = len(sizes.seeds)

    def corrected(measures: Mapping[str, str]) -> dict[tuple[str, Pair], Difference]:
        known = {}
        for data, measure in measures.items():
            for pair in COMPARISONS:
                arms = [records[data][arm] for arm in pair]
                values = [{seed: record["metrics"][measure] for seed, record in of.items()} for of in arms]
                if all(len(of) == n for of in values):
                    known[data, pair] = paired_difference(*values)
        return correct_planned(dict.fromkeys(itertools.product(measures, COMPARISONS), n), known)

    trained = sum(len(of) for arms in records.values() for of in arms.values())
    return Findings(
        searches,
        records,
        len(finds) * len(ARMS) * n - trained,
        corrected(dict.fromkeys(finds, plan.PRIMARY)),
        corrected({data: plan.SECONDARY[data] for data in finds}),
    )


def orders_help(found: Findings) -> list[str]:
    """Return the data sets on which orders help: with any, the plan gives the product a folder of orders.

    R@10 is above CLIP's in random batches, or with neighbours above CLIP's in both kinds of batches.
    """
    return [
        data
        for data in found.records
        if found.above(data, ORDERS, CLIP)
        or (found.above(data, NEAR_ORDERS, CLIP) and found.above(data, NEAR_ORDERS, NEAR_CLIP))
    ]


def neighbours_help(found: Findings) -> list[str]:
    """Return the data sets on which neighbours help orders: with any, the plan gives it the sampler, too."""
    return [data for data in found.records if orders_help(found) and found.above(data, NEAR_ORDERS, ORDERS)]
