"""Records of the test side to differences: paired by seed, corrected as the plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct_planned, estimate, paired_difference

from . import plan
from .measure import BOTH_WAYS
from .plan import Arm, Comparison, Find


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score of a record."""

    title: str
    task: str
    name: str
    digits: int = 2

    def __call__(self, record: Record) -> float:
        """Return the score."""
        return float(record["metrics"][self.task][self.name])


PRIMARY = Measure("R@10, both", "retrieval", BOTH_WAYS)
_WAYS = {"image_to_text": "picture → sentence", "text_to_image": "sentence → picture"}
CORRELATION = Measure("τ_c, experts", "people", "experts τ_c")
SCALE = Measure("scale", "geometry", "logit_scale")
SECONDARY = (
    *(
        Measure(f"{score}, {to}", "retrieval", f"{way} {score}")
        for way, to in _WAYS.items()
        for score in ("R@1", "R@5", "median rank")
    ),
    CORRELATION,
    Measure("τ_b, experts", "people", "experts τ_b"),
    Measure("cross-modal τ", "geometry", "cross_modal_tau", 3),
    Measure("in-modal τ", "geometry", "in_modal_tau", 3),
    Measure("modality gap", "geometry", "modality_gap", 3),
    SCALE,
)
DRAWN = {PRIMARY: "R@10, mean of both directions", CORRELATION: "τ_c with the experts"}  # in figures
# Shown, but not tested: their mean is the primary measure.
DIRECTIONS = tuple(Measure(f"R@10, {to}", "retrieval", f"{way} R@10") for way, to in _WAYS.items())


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows of the test side."""

    arms: dict[str, Arm]
    records: dict[str, dict[int, Record]]  # by arm and seed
    rows: dict[str, Comparison]  # by the arm's name
    differences: dict[tuple[str, str], Difference]  # by arm and measure; complete comparisons alone

    def difference(self, arm: str, measure: Measure) -> Difference | None:
        """Return a comparison's difference; None until all of its trainings are there."""
        return self.differences.get((arm, measure.title))

    def primary(self, arm: str) -> Difference | None:
        """Return a comparison's difference in the primary measure."""
        return self.difference(arm, PRIMARY)

    def estimate(self, arm: str, measure: Measure) -> Estimate | None:
        """Return a measure's mean over the arm's seeds."""
        of = self.records[arm]
        return estimate([measure(of[seed]) for seed in sorted(of)]) if of else None


def findings(arms: Mapping[str, Arm], find: Find) -> Findings:
    """Return the comparisons whose trainings are all there, corrected as the plan says.

    The correction counts every planned test; one that cannot be stated yet has p = 1.
    """
    records = {
        name: {one.seed: record for one, record in find(arm.settings()).items()} for name, arm in arms.items()
    }
    compared = [one for one in plan.comparisons(arms) if arms[one.arm].seeds]
    whole = {
        one.arm
        for one in compared
        if all(len(records[name]) == len(arms[name].seeds) for name in (one.arm, one.reference))
    }

    def corrected(measures: Sequence[Measure]) -> dict[tuple[str, str], Difference]:
        planned = {(one.arm, m.title): len(arms[one.arm].seeds) for one in compared for m in measures}
        known = {}
        for one in compared:
            for measure in measures if one.arm in whole else ():
                of, reference = (
                    {seed: measure(record) for seed, record in records[name].items()}
                    for name in (one.arm, one.reference)
                )
                known[one.arm, measure.title] = paired_difference(of, reference)
        return correct_planned(planned, known)

    return Findings(
        dict(arms),
        records,
        {one.arm: one for one in compared},
        {**corrected([PRIMARY]), **corrected(SECONDARY)},
    )
