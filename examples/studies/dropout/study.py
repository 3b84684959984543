"""The study: CLIP's loss, smoothing and spread on heads with the same dropout, and each with its best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studies.baselines.study import Setting, data
from studies.cells import Tested, mean_rows, primary_values
from studies.heads.study import SCALE, SMOOTHING, loss_of
from studies.plan import Best, Find, best_of
from studies.report import conditions_texts, tries_row
from studies.runner import Study
from studies.statistics import Arms, Pair
from studies.students.measure import CORRELATION, PRIMARY

PRIMARY_TESTS: dict[str, Pair] = {
    "a": ("spread", "clip"),
    "b": (SMOOTHING, "clip"),
    "c": ("spread", SMOOTHING),
}
AGAINST_CLIP = [pair for pair in PRIMARY_TESTS.values() if pair[1] == "clip"]
"""One family: comparisons of one kind are corrected together."""
BEST = "each at its best"
"""The cell in which each arm has the dropout that is best for it."""


def tuned(sizes: SimpleNamespace, find: Find, arm: str, dropouts: Sequence[float]) -> Best:
    """Return an arm's tries with some dropouts, at every learning rate: means over the tuning seeds.

    Raises:
        MissingError: If one has no record.
    """
    base = Setting(
        loss_of(arm),
        sizes.tuning_seeds[0],
        "dev",
        **sizes.sizes[find.data],
        **sizes.arms[arm],
    )
    tries = [dataclasses.replace(base, dropout=dropout, lr=lr) for dropout in dropouts for lr in sizes.rates]
    return best_of(arm, tries, find.means(PRIMARY, sizes.tuning_seeds))


def cells(sizes: SimpleNamespace) -> dict[str, list[float]]:
    """Return the dropouts among which each arm has its best, by cell."""
    return {**{f"dropout {one:g}": [one] for one in sizes.dropouts}, BEST: sizes.dropouts}


def tested(sizes: SimpleNamespace, find: Find) -> list[Tested]:
    """Return the records of the test side by cell.

    Raises:
        MissingError: If a try or a test has no record; the first.
    """
    found = []
    for cell, dropouts in cells(sizes).items():
        chosen = {arm: tuned(sizes, find, arm, dropouts).chosen for arm in sizes.arms}
        found.append(Tested(cell, Arms(find.arms(chosen, sizes.seeds))))
    return found


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values; asks for all trainings."""
    (find,) = (finds[name] for name in sizes.sizes)
    every = tested(sizes, find)
    return {
        "records": len(find.records),
        **primary_values(every, PRIMARY_TESTS, AGAINST_CLIP),
        "arms": mean_rows(every, [PRIMARY, CORRELATION, SCALE]),
        "tries": [
            tries_row(
                tuned(sizes, find, arm, sizes.dropouts), lambda one: f"lr {one.lr:g}, dropout {one.dropout:g}"
            )
            for arm in sizes.arms
        ],
        "made": conditions_texts(find.records.values()),
    }


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="plan.yaml",
        records={"photographs": "photographs", "emojis": "emojis"},
        data=data,
        results=results,
        report="dropout",
    )
