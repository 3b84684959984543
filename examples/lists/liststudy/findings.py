"""Records of the test to differences: paired by seed, corrected as the plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct_planned, estimate, paired_difference

from . import plan
from .plan import ARMS, CLIP, Find, Plan, Search, score

Pair = tuple[str, str]  # an arm minus another


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows of an example."""

    primary: str
    secondary: tuple[str, ...]
    searches: dict[str, Search]
    records: dict[str, dict[int, Record]]  # by arm and seed
    missing: int  # trainings of the test
    tests: dict[Pair, Difference]  # in the primary measure; complete comparisons alone
    others: dict[tuple[str, str], Difference]  # by arm and secondary measure, minus CLIP

    def estimate(self, arm: str, measure: str) -> Estimate | None:
        """Return a measure's mean over the arm's seeds."""
        of = self.records[arm]
        return estimate([score(of[seed], measure) for seed in sorted(of)]) if of else None

    def sign(self, arm: str, other: str) -> int | None:
        """Return the sign of a difference, 0 where it is not established; None where it is not tested."""
        turned = (arm, other) not in self.tests
        found = self.tests.get((other, arm) if turned else (arm, other))
        if found is None:
            return None
        sign = 0 if not found.established else 1 if found.mean > 0 else -1
        return -sign if turned else sign


def findings(sizes: Plan, primary: str, secondary: tuple[str, ...], find: Find) -> Findings:
    """Return the comparisons whose trainings are all there.

    The correction counts every planned test; one that cannot be stated yet has p = 1.
    """
    searches = plan.searches(sizes, primary, find)
    settings = plan.arms(sizes, searches)
    records = {arm: {one.seed: record for one, record in find(settings.get(arm, ())).items()} for arm in ARMS}
    whole = {arm for arm, of in records.items() if len(of) == len(sizes.seeds)}

    def corrected(compared: Iterable[tuple[Pair, str]]) -> dict[tuple[Pair, str], Difference]:
        planned, known = dict.fromkeys(compared, len(sizes.seeds)), {}
        for pair, measure in planned:
            of = [{seed: score(record, measure) for seed, record in records[arm].items()} for arm in pair]
            if whole.issuperset(pair):
                known[pair, measure] = paired_difference(*of)
        return correct_planned(planned, known)

    tests = corrected((pair, primary) for pair in plan.comparisons())
    others = corrected(((arm, CLIP), measure) for arm in ARMS[1:] for measure in secondary)
    return Findings(
        primary,
        secondary,
        searches,
        records,
        len(ARMS) * len(sizes.seeds) - sum(map(len, records.values())),
        {pair: found for (pair, _), found in tests.items()},
        {(pair[0], measure): found for (pair, measure), found in others.items()},
    )


def winner(found: Findings, group: Iterable[str]) -> str | None:
    """Return the arm that is above every other of its group, after the correction."""
    names = list(group)
    for arm in names:
        if all(found.sign(arm, other) == 1 for other in names if other != arm):
            return arm
    return None


def best(found: Findings, group: Iterable[str]) -> tuple[str, list[str]]:
    """Return the arm of the largest mean, and those of its group that do not differ significantly from it."""
    means: Mapping[str, float] = {
        arm: value.mean for arm in group if (value := found.estimate(arm, found.primary)) is not None
    }
    first = max(means, key=means.__getitem__)
    return first, [arm for arm in means if arm != first and found.sign(first, arm) != 1]
