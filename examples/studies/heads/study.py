"""The study: five losses of pairs alone on two heads, each tuned by itself, and the tests of its plan."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studies.baselines.study import Setting, data
from studies.cells import Tested, mean_rows, primary_values, rows
from studies.plan import Best, Find, MissingError, best_of
from studies.records import Record
from studies.report import conditions_texts, tries_row
from studies.runner import Study
from studies.statistics import Arms, Measure, Pair
from studies.students import losses
from studies.students.measure import CORRELATION, PRIMARY

SETS = ("photographs", "emojis")
SMOOTHING = "smoothing"  # the arm of CLIP's loss that is smoothed
PRIMARY_TESTS: dict[str, Pair] = {
    "a": ("spread", "clip"),
    "b": ("rankclip", "spread"),
    "c": ("rankclip-spread", "spread"),
    "d": (SMOOTHING, "clip"),
}
SECONDARY: list[Pair] = [("spread", SMOOTHING), ("rankclip", "clip")]
AGAINST_CLIP = [pair for pair in (*PRIMARY_TESTS.values(), *SECONDARY) if pair[1] == "clip"]
"""One family: comparisons of one kind are corrected together."""
SCALE = Measure("scale", ("geometry", "logit_scale"), 1)


def loss_of(arm: str) -> str:
    """Return the loss of an arm, of those of :mod:`studies.students.losses`."""
    return losses.CLIP if arm == SMOOTHING else arm


def arm_of(one: Setting) -> str:
    """Return the arm of a setting."""
    return SMOOTHING if one.label_smoothing else one.arm


def tried(sizes: SimpleNamespace, name: str, find: Find, arm: str) -> Best:
    """Return an arm's tries: rates, then dropouts at the best rate, then its own numbers at the best so far.

    Raises:
        MissingError: If one has no record.
    """
    ((field, values),) = sizes.numbers[arm].items()
    base = Setting(
        loss_of(arm),
        sizes.try_seed,
        "dev",
        **sizes.sizes[name],
        dropout=sizes.dropouts[0],
        **{field: values[0]},
    )
    tries = [dataclasses.replace(base, lr=rate) for rate in sizes.rates]
    for factor, others in (("dropout", sizes.dropouts[1:]), (field, values[1:])):
        best = best_of(arm, tries, find.scores(PRIMARY)).chosen
        tries += [dataclasses.replace(best, **{factor: value}) for value in others]
    return best_of(arm, tries, find.scores(PRIMARY))


def settings(sizes: SimpleNamespace, name: str, find: Find) -> dict[str, Setting]:
    """Return the best try of every arm.

    Raises:
        MissingError: If a try has no record.
    """
    return {arm: tried(sizes, name, find, arm).chosen for arm in sizes.numbers}


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all trainings in their order; data sets that are not there are passed over.

    Raises:
        MissingError: If a training has no record; the first.
    """
    for name in SETS:
        if name in finds and name in sizes.sizes:
            finds[name].arms(settings(sizes, name, finds[name]), sizes.seeds)


def by_set(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> Iterator[Tested]:
    """Yield the records of every data set's test side, of those seeds that all arms have."""
    for name, find in finds.items():
        records: dict[str, dict[int, Record]] = {}
        with contextlib.suppress(MissingError):
            chosen = settings(sizes, name, find)
            for seed in sizes.seeds:
                for arm, of in find.arms(chosen, [seed]).items():
                    records.setdefault(arm, {}).update(of)
        if records:
            yield Tested(name, Arms(records))


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the records that are there."""
    every = list(by_set(sizes, finds))
    return {
        "records": sum(len(find.records) for find in finds.values()),
        **primary_values(every, PRIMARY_TESTS, AGAINST_CLIP),
        "secondary": [row for pair in SECONDARY for row in rows(every, [pair], AGAINST_CLIP)],
        "arms": mean_rows(every, [PRIMARY, CORRELATION, SCALE]),
        "tries": [
            [of.cell, *tries_row(tried(sizes, of.cell, finds[of.cell], arm), lambda one: _text(sizes, one))]
            for of in every
            for arm in sizes.numbers
        ],
        "made": conditions_texts(record for find in finds.values() for record in find.records.values()),
    }


def _text(sizes: SimpleNamespace, one: Setting) -> str:
    (field,) = sizes.numbers[arm_of(one)]
    return f"lr {one.lr:g}, dropout {one.dropout:g}, {field.replace('_', ' ')} {getattr(one, field):g}"


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="plan.yaml",
        records={name: name for name in SETS},
        data=data,
        results=results,
        report="heads",
        ask=ask,
    )
