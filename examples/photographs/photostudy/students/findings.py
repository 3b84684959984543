"""Records of the test side to differences: paired by seed, corrected as the plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct, estimate, paired_difference

from photostudy.findings import PRIMARY, SECONDARY, Measure
from photostudy.plan import Find, Search

from . import plan
from .plan import CLIP, COMPARISONS, GRIDS, RANKS, TAUGHT, Choice, Pair, Plan

Key = tuple[Pair, str]  # a comparison, and a measure's title


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows."""

    search: Search  # CLIP's
    choices: dict[str, Choice]  # by arm, once CLIP's search is finished
    records: dict[str, dict[int, Record]]  # of the test side, by arm and seed
    missing: int  # trainings of the test side
    differences: dict[Key, Difference]  # complete comparisons alone
    planned: dict[Key, Difference]  # all comparisons, not corrected; p = 1 for one that lacks a training

    def estimate(self, arm: str, measure: Measure) -> Estimate | None:
        """Return a measure's mean over the arm's seeds."""
        of = self.records[arm]
        return estimate([measure(of[seed]) for seed in sorted(of)]) if of else None

    def difference(self, pair: Pair, measure: Measure = PRIMARY) -> Difference | None:
        """Return a comparison's difference; None until all of its trainings are there."""
        return self.differences.get((pair, measure.title))

    def above(self, pair: Pair, measure: Measure = PRIMARY) -> bool:
        """Return True where the first arm is above the second after the correction."""
        found = self.difference(pair, measure)
        return found is not None and found.established and found.mean > 0

    def leading(self, measure: Measure) -> str:
        """Return the teacher's arm with the largest mean."""
        means = {arm: self.estimate(arm, measure) for arm in TAUGHT}
        return max(TAUGHT, key=lambda arm: means[arm].mean)


def findings(sizes: Plan, find: Find, others: Mapping[Key, Difference] | None = None) -> Findings:
    """Return the comparisons whose trainings are all there.

    The correction counts every planned test, those of part 2b, too; one that cannot be stated yet has p = 1.
    ``others`` are part 2b's, :attr:`Findings.planned`; None: all of them have p = 1.
    """
    search = plan.of_clip(sizes, find)
    choices = {} if search.due else {arm: plan.choice(sizes, arm, search.chosen, find) for arm in GRIDS}
    settings, n = plan.arms(sizes, find), len(sizes.seeds)
    if others is None:
        unknown = [(("2b", str(i)), m.title) for i in range(plan.OTHERS) for m in (PRIMARY, *SECONDARY)]
        others = dict.fromkeys(unknown, Difference(0.0, None, n, p=1.0))
    arms = {arm: settings.get(arm, ()) for arm in (CLIP, *GRIDS)}
    return compared(search, choices, arms, n, find, COMPARISONS, others)


def compared(
    search: Search, choices: dict[str, Choice], arms: Mapping[str, Sequence[Any]], seeds: int, find: Find,
    comparisons: Sequence[Pair], others: Mapping[Key, Difference],
) -> Findings:  # fmt: skip
    """Return the findings of arms, given their settings on the test side, beside other planned tests."""
    records = {arm: {one.seed: record for one, record in find(of).items()} for arm, of in arms.items()}
    whole = [pair for pair in comparisons if all(len(records[arm]) == seeds for arm in pair)]
    planned = dict.fromkeys(
        ((pair, m.title) for pair in comparisons for m in (PRIMARY, *SECONDARY)),
        Difference(0.0, None, seeds, p=1.0),
    )
    for pair in whole:
        for m in (PRIMARY, *SECONDARY):
            of = ({seed: m(record) for seed, record in records[arm].items()} for arm in pair)
            planned[pair, m.title] = paired_difference(*of)

    def corrected(measures: Sequence[Measure]) -> dict[Key, Difference]:
        titles = {m.title for m in measures}
        # The parts have arms of equal names: a key alone would not tell their tests apart.
        family = {
            (is_own, key): d
            for is_own, tests in ((True, planned), (False, others))
            for key, d in tests.items()
            if key[1] in titles
        }
        return {key: d for (is_own, key), d in correct(family).items() if is_own and key[0] in whole}

    return Findings(
        search,
        choices,
        records,
        sum(seeds - len(of) for of in records.values()),
        {**corrected([PRIMARY]), **corrected(SECONDARY)},
        planned,
    )


def helping(found: Findings) -> list[str]:
    """Return the arms above CLIP."""
    return [arm for arm in GRIDS if found.above((arm, CLIP))]


def above_ranks(found: Findings) -> list[str]:
    """Return the teachers' arms above ranks."""
    return [arm for arm in TAUGHT if arm != RANKS and found.above((arm, RANKS))]


def ranks_are_best(found: Findings) -> bool:
    """Return True where every other teacher's arm is below ranks after the correction."""
    differences = [found.difference((arm, RANKS)) for arm in TAUGHT if arm != RANKS]
    return all(d is not None and d.established and d.mean < 0 for d in differences)
