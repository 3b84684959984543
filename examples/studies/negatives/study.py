"""The study: tries, arms from initial weights and fine-tuned, and the report's values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np

from studies.plan import Best, Find, best_of
from studies.records import Record
from studies.report import conditions_texts, ends_text, mean_text, test_cells, tries_row
from studies.runner import Study
from studies.statistics import Arms, Measure, Pair
from studies.students.measure import PRIMARY, hits_of_pictures

from .data import START, Setting, data, told_of_pictures
from .losses import CLIP, LISTS, NEGCLIP, PREFERENCES
from .rules import KINDS

FRESH, TUNED = "fresh", "tuned"
GENTLE, MIMICRY = "-gentle", "-mimicry"
ACCURACY, BLIND, SEEN = (Measure(name, ("told", name)) for name in ("accuracy", "blind", "seen"))
DOGS = Measure("R@10 of dogs", ("dogs", "R@10"))
RULES = [Measure(name, ("told", name)) for name in KINDS]
TESTED: dict[Measure, Callable[[Record], np.ndarray]] = {
    PRIMARY: hits_of_pictures,
    ACCURACY: told_of_pictures,
    SEEN: lambda record: told_of_pictures(record) - told_of_pictures(record, "blind right"),
}
"""The measures that are tested, each with its values by picture."""
SHOWN = {FRESH: (PRIMARY, ACCURACY, BLIND, SEEN, *RULES), TUNED: (PRIMARY, DOGS, ACCURACY, BLIND, SEEN)}
PAIRS: dict[str, list[Pair]] = {
    FRESH: [(arm, CLIP) for arm in (NEGCLIP, LISTS, PREFERENCES)],
    TUNED: [
        *((arm, CLIP) for arm in (NEGCLIP, PREFERENCES)),
        *((arm + MIMICRY, arm) for arm in (NEGCLIP, PREFERENCES)),
        (NEGCLIP + MIMICRY, NEGCLIP + GENTLE),
    ],
}


def overall(record: Record) -> float:
    """Return the mean of R@10 and the accuracy."""
    return fmean((PRIMARY(record), ACCURACY(record)))


def learned(record: Record) -> float:
    """Return what fine-tuning is for, the mean of R@10 of dogs and the accuracy."""
    return fmean((DOGS(record), ACCURACY(record)))


def balanced(record: Record) -> float:
    """Return the mean of what is kept, R@10 of the others, and of what is learned."""
    return fmean((PRIMARY(record), learned(record)))


def chosen(sizes: SimpleNamespace, find: Find) -> dict[str, dict[str, Best]]:
    """Return the tries of every arm.

    Raises:
        MissingError: If a record is missing.
    """

    def best(
        name: str, base: Setting, grid: Mapping[str, Iterable[float]], score: Callable[[Record], float]
    ) -> Best:
        ((field, values),) = grid.items()
        return best_of(name, [dataclasses.replace(base, **{field: x}) for x in values], find.scores(score))

    start = Setting(CLIP, sizes.try_seed, "dev", **sizes.all)
    fresh: dict[str, Best] = {}
    for arm, grid in sizes.fresh.items():
        lr = fresh[CLIP].chosen.lr if fresh else start.lr
        fresh[arm] = best(arm, dataclasses.replace(start, arm=arm, lr=lr), grid, overall)
    tuned: dict[str, Best] = {}
    for arm in (CLIP, NEGCLIP, PREFERENCES):
        own = {"arm": arm, "start_lr": fresh[CLIP].chosen.lr, "weight": fresh[arm].chosen.weight}
        base = dataclasses.replace(start, **sizes.dogs, **own)
        tuned[arm] = best(arm, base, sizes.tuned["plain"], learned)
        plain = tuned[arm].chosen
        if arm != CLIP:
            tuned[arm + MIMICRY] = best(arm + MIMICRY, plain, sizes.tuned["mimicry"], balanced)
        if arm == NEGCLIP:
            tuned[arm + GENTLE] = best(arm + GENTLE, plain, sizes.tuned["gentle"], balanced)
    return {FRESH: fresh, TUNED: tuned}


def settings(tries: Mapping[str, Mapping[str, Best]]) -> dict[str, dict[str, Setting]]:
    """Return the settings of the test, with the heads before fine-tuning as an arm."""
    found = {part: {arm: best.chosen for arm, best in of.items()} for part, of in tries.items()}
    start = dataclasses.replace(found[TUNED][CLIP], arm=START, lr=0.0)
    return {FRESH: found[FRESH], TUNED: {START: start, **found[TUNED]}}


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all trainings of the plan, seed by seed.

    Raises:
        MissingError: If a record is missing.
    """
    (find,) = finds.values()
    for seed, of in itertools.product(sizes.seeds, settings(chosen(sizes, find)).values()):
        find.arms(of, [seed])


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the seeds whose trainings are all there."""
    (find,) = finds.values()
    tries = chosen(sizes, find)

    def whole(of: Mapping[str, Setting], seed: int) -> bool:
        wanted = {dataclasses.replace(one, seed=seed, side="test") for one in of.values()}
        return find.there(wanted).keys() == wanted

    planned = settings(tries)
    seeds = [seed for seed in sizes.seeds if all(whole(of, seed) for of in planned.values())]
    arms = {part: Arms(find.arms(of, seeds)) for part, of in planned.items()}

    def rows(part: str) -> list[list[str]]:
        tests = arms[part].tests(PAIRS[part], TESTED)
        return [
            [
                *(f"`{arm}`" for arm in pair),
                measure.title,
                *test_cells(tests[pair, measure.title]),
                ends_text(arms[part].over_pictures(pair, read)),
            ]
            for pair, (measure, read) in itertools.product(PAIRS[part], TESTED.items())
        ]

    return {
        "seeds": seeds,
        "heads": {part: [measure.title for measure in of] for part, of in SHOWN.items()},
        "means": {
            part: [[f"`{arm}`", *(mean_text(of.estimate(arm, x)) for x in SHOWN[part])] for arm in of.records]
            for part, of in arms.items()
        },
        "tests": {part: rows(part) for part in arms},
        "tries": [[part, *tries_row(best, _text)] for part, of in tries.items() for best in of.values()],
        "made": conditions_texts(record for of in arms.values() for record in of.all),
    }


def _text(one: Setting) -> str:
    own = {"weight": one.weight * (one.arm in (LISTS, PREFERENCES)), "mimicry": one.mimicry}
    return ", ".join([f"lr {one.lr:g}", *(f"{name} {value:g}" for name, value in own.items() if value)])


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="settings.yaml",
        records={"photographs": "photographs"},
        data=data,
        results=results,
        report="negatives",
        template="template.md",
        ask=ask,
    )
