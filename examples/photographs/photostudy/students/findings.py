"""Records of the test side to differences: paired by seed, corrected as the plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct, estimate, paired_difference

from photostudy.findings import PRIMARY, SECONDARY, Measure
from photostudy.plan import Find, Search

from . import plan
from .plan import CLIP, COMPARISONS, GRIDS, RANKS, TAUGHT, Choice, Pair, Plan


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows."""

    search: Search  # CLIP's
    choices: dict[str, Choice]  # by arm, once CLIP's search is finished
    records: dict[str, dict[int, Record]]  # of the test side, by arm and seed
    missing: int  # trainings of the test side
    differences: dict[tuple[Pair, str], Difference]  # by measure's title; complete comparisons alone

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


def findings(sizes: Plan, find: Find) -> Findings:
    """Return the comparisons whose trainings are all there.

    The correction counts every planned test, those of part 2b, too; one that cannot be stated yet has p = 1.
    """
    search = plan.of_clip(sizes, find)
    choices = {} if search.due else {arm: plan.choice(sizes, arm, search.chosen, find) for arm in GRIDS}
    settings, n = plan.arms(sizes, find), len(sizes.seeds)
    records = {
        arm: {one.seed: record for one, record in find(settings.get(arm, ())).items()}
        for arm in (CLIP, *GRIDS)
    }

    def corrected(measures: Sequence[Measure]) -> dict[tuple[Pair, str], Difference]:
        known = {}
        for pair in COMPARISONS:
            if all(len(records[arm]) == n for arm in pair):
                for measure in measures:
                    of = ({seed: measure(record) for seed, record in records[arm].items()} for arm in pair)
                    known[pair, measure.title] = paired_difference(*of)
        keys = [(pair, measure.title) for pair in COMPARISONS for measure in measures]
        others = [("2b", i) for i in range(plan.OTHERS * len(measures))]
        planned = dict.fromkeys([*keys, *others], Difference(0.0, None, n, p=1.0))
        return {key: d for key, d in correct(planned | known).items() if key in known}

    return Findings(
        search,
        choices,
        records,
        sum(n - len(of) for of in records.values()),
        {**corrected([PRIMARY]), **corrected(SECONDARY)},
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
