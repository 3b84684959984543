"""The report of part 1, from its records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from examples_common.records import Record
from examples_common.statistics import Difference, Estimate, correct, estimate, paired_difference
from examples_common.wording import difference_text, fill, mean_text

from . import plan
from .heads import Setting
from .measure import BOTH_WAYS
from .plan import Arm, Comparison, Find, Plan, Search


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
SECONDARY = (
    *(Measure(f"{score}, {to}", "retrieval", f"{way} {score}") for way, to in _WAYS.items()
      for score in ("R@1", "R@5", "median rank")),
    Measure("τ_c, experts", "people", "experts τ_c"),
    Measure("τ_b, experts", "people", "experts τ_b"),
    Measure("cross-modal τ", "geometry", "cross_modal_tau", 3),
    Measure("in-modal τ", "geometry", "in_modal_tau", 3),
    Measure("modality gap", "geometry", "modality_gap", 3),
    Measure("scale", "geometry", "logit_scale"),
)
# Shown, but not tested: their mean is the primary measure.
_DIRECTIONS = tuple(Measure(f"R@10, {to}", "retrieval", f"{way} R@10") for way, to in _WAYS.items())


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison: what was trained of it, and its differences by measure."""

    comparison: Comparison
    planned: int
    differences: dict[str, Difference]  # by the measure's title; empty until all trainings are there

    @property
    def primary(self) -> Difference | None:
        """The difference in the primary measure."""
        return self.differences.get(PRIMARY.title)


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report shows of the test side."""

    arms: dict[str, Arm]
    records: dict[str, dict[int, Record]]  # by arm and seed
    rows: dict[str, Row]

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
    whole = [
        one
        for one in compared
        if all(len(records[name]) == len(arms[name].seeds) for name in (one.arm, one.reference))
    ]

    def corrected(measures: tuple[Measure, ...]) -> dict[tuple[str, str], Difference]:
        family = {}
        for one in compared:
            for measure in measures:
                of, reference = (
                    {seed: measure(record) for seed, record in records[name].items()}
                    for name in (one.arm, one.reference)
                )
                found = paired_difference(of, reference) if one in whole else None
                family[one.name, measure.title] = found or Difference(0.0, None, len(arms[one.arm].seeds), 1.0)
        return correct(family)

    tested = {**corrected((PRIMARY,)), **corrected(SECONDARY)}
    rows = {}
    for one in compared:
        own = {title: d for (name, title), d in tested.items() if name == one.name and one in whole}
        rows[one.name] = Row(one, len(arms[one.arm].seeds), own)
    return Findings(dict(arms), records, rows)


def write(sizes: Plan, find: Find, folder: Path) -> Path:
    """Write the report and return its path."""
    searches = {loss: plan.search(sizes, loss, find) for loss in plan.TUNED}
    over = not any(search.due for search in searches.values())
    found = findings(plan.arms(sizes, *searches.values(), plan.scale_of(sizes, searches["clip"], find)), find) if over else None
    text = fill(
        Path(__file__).with_name("report.md"),
        sizes=sizes,
        searches=searches,
        factors=_factors(searches),
        over=over,
        found=found,
        missing=0 if found is None else _missing(found),
        arms=[] if found is None else _arms(found),
        tests=[] if found is None else _tests(found),
        secondary=[] if found is None else _secondary(found),
        primary=PRIMARY.title,
        conditions=[] if found is None else _conditions(found),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "part1.md"
    path.write_text(text, encoding="utf-8")
    return path


def _factors(searches: Mapping[str, Search]) -> list[list[str]]:
    """Return the searches' tables: a row for each level, a column for each loss."""
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for loss, search in searches.items():
        for one in search.tries:
            scores = ", ".join(f"{score:.2f}" for score in one.scores)
            rows.setdefault((one.factor, one.level), {})[loss] = f"{scores}{' (taken)' * one.taken}"
    return [
        [factor.replace("_", " "), f"{level:g}", *(of.get(loss, "–") for loss in searches)]
        for (factor, level), of in rows.items()
    ]


def _missing(found: Findings) -> int:
    return sum(len(arm.seeds) - len(found.records[name]) for name, arm in found.arms.items())


def _arms(found: Findings) -> list[list[str]]:
    """Return a table of means: an arm in each row."""
    shown = (PRIMARY, *_DIRECTIONS, SECONDARY[6], SECONDARY[-1])
    return [
        [name, *(mean_text(found.estimate(name, measure), len(arm.seeds), measure.digits) for measure in shown)]
        for name, arm in found.arms.items()
        if arm.seeds
    ]


def _tests(found: Findings) -> list[dict[str, Any]]:
    return [
        {"name": name, "reference": row.comparison.reference, "difference": row.primary, "planned": row.planned}
        for name, row in found.rows.items()
    ]


def _secondary(found: Findings) -> list[list[str]]:
    """Return a table of differences: a measure in each row, a comparison in each column."""
    table = []
    for measure in SECONDARY:
        cells = [row.differences.get(measure.title) for row in found.rows.values()]
        table.append([measure.title, *(_marked(d, measure.digits) for d in cells)])
    return table


def _marked(difference: Difference | None, digits: int) -> str:
    text = difference_text(difference, digits)
    return f"**{text}**" if difference is not None and difference.established else text


def _conditions(found: Findings) -> list[list[str]]:
    records = [record for of in found.records.values() for record in of.values()]
    seconds = [sum(record["processor_seconds"].values()) for record in records]
    kinds = sorted({", ".join(f"{k} {v}" for k, v in record["conditions"].items()) for record in records})
    rows = [["trainings on the test side", f"{len(records)}, {fmean(seconds):.0f} s of one core each"]] if records else []
    return [*rows, *(["on", kind] for kind in kinds)]
