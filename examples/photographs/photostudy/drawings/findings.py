"""Records to choices and differences: paired by seed, corrected over both data sets together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import fmean

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct_planned, estimate, paired_difference

from photostudy.findings import PRIMARY
from photostudy.plan import Changes, Find, Search, score
from photostudy.students.plan import CLIP, RANKS, Choice, Pair

from . import plan
from .plan import COMPARISONS, GRIDS, SETS, VARIANTS, Plan


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows."""

    searches: dict[str, Search]  # CLIP's, by data set
    choices: dict[str, Choice]  # by arm; empty until CLIP's searches are finished
    variants: dict[str, dict[str, float]]  # R@10 on the dev side, by variant of ranks and data set
    records: dict[str, dict[str, dict[int, Record]]]  # of the test side, by data set, arm and seed
    missing: int  # trainings of the test side
    tests: dict[tuple[str, Pair], Difference]  # by data set; complete comparisons alone

    def estimate(self, name: str, arm: str) -> Estimate | None:
        """Return the mean R@10 over the arm's seeds on a data set."""
        of = self.records[name][arm]
        return estimate([PRIMARY(of[seed]) for seed in sorted(of)]) if of else None

    def established(self, pair: Pair, sign: int) -> list[str]:
        """Return the data sets where the first arm is above (1) or below (−1) the second, corrected."""
        tests = {name: self.tests.get((name, pair)) for name in SETS}
        return [name for name, d in tests.items() if d is not None and d.established and d.mean * sign > 0]

    @property
    def better_variants(self) -> list[str]:
        """The variants that are ahead of ranks on both dev sides."""
        ranks = self.variants.get(RANKS)
        there = [arm for arm in VARIANTS if ranks and arm in self.variants]
        return [arm for arm in there if all(self.variants[arm][name] > ranks[name] for name in SETS)]

    @property
    def candidates(self) -> list[str]:
        """The rivals above ranks on a data set, and below them on none."""
        pairs = [(arm, RANKS) for arm in GRIDS if arm != RANKS]
        return [pair[0] for pair in pairs if self.established(pair, 1) and not self.established(pair, -1)]


def findings(sizes: Plan, finds: Mapping[str, Find]) -> Findings:
    """Return the choices, and the comparisons whose trainings are all there.

    The correction counts every planned test; one that cannot be stated yet has p = 1.
    """
    searches = {name: plan.of_clip(sizes, name, finds[name]) for name in SETS}
    clip = {name: search.chosen for name, search in searches.items()}
    choices: dict[str, Choice] = {}
    if not any(search.due for search in searches.values()):
        find = plan.joint(finds, clip)
        choices = {arm: plan.choice(sizes, arm, find) for arm in GRIDS}
    n = len(sizes.seeds)
    records = {}
    for name in SETS:
        known = plan.tests(sizes, choices, clip[name]) if choices else {}
        records[name] = {
            arm: {one.seed: record for one, record in finds[name](known.get(arm, ())).items()}
            for arm in (CLIP, *GRIDS)
        }
    planned = {(name, pair): n for name in SETS for pair in COMPARISONS}
    differences = {}
    for name, pair in planned:
        values = [{seed: PRIMARY(one) for seed, one in records[name][arm].items()} for arm in pair]
        if all(len(of) == n for of in values):
            differences[name, pair] = paired_difference(*values)
    return Findings(
        searches,
        choices,
        _variants(sizes, finds, choices, clip),
        records,
        sum(n - len(of) for arms in records.values() for of in arms.values()),
        correct_planned(planned, differences),
    )


def _variants(
    sizes: Plan, finds: Mapping[str, Find], choices: Mapping[str, Choice], clip: Mapping[str, Changes]
) -> dict[str, dict[str, float]]:
    """Return the mean R@10 of ranks and of its variants on each dev side, of those that are all there."""
    found: dict[str, dict[str, float]] = {}
    for arm, settings in plan.variants(sizes, choices.get(RANKS)).items():
        of = {name: finds[name]([plan.on(one, clip[name]) for one in settings]).values() for name in SETS}
        if all(len(records) == len(settings) for records in of.values()):
            found[arm] = {name: fmean(map(score, records)) for name, records in of.items()}
    return found
