"""The one look at the test side: every arm's winner against plain CLIP, with fresh seeds.

What is confirmed is recorded before its first training. From then on another winner is refused, so that the
test side cannot be used to choose. Nothing is concluded before every planned record is there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from examples_common.records import append_lines, read_lines
from examples_common.statistics import Difference, correct

from miniature_paper import scores
from miniature_paper.collection import Score

from .ladder import Comparison, Find
from .objective import RECALL, SCORES
from .study import Study
from .trials import LOSS, RECIPE, REFERENCE, TEST, Attempt, Trial

Pair = tuple[str, str]  # two arms, or an arm and plain CLIP
Key = TypeVar("Key")
_AGREEMENT = tuple(
    scores.Measure("Agreement with the teacher", label, (("teacher/test", key),), percent=False)
    for key, label in (("cross_modal_tau", "cross-modal (τ)"), ("in_modal_tau", "in-modal (τ)"))
)


class SecondConfirmationError(RuntimeError):
    """The test side has been used already."""


def declare(study: Study, winners: Mapping[str, Trial], results: Path, *, record: bool) -> None:
    """Check the winners against the recorded confirmations; with ``record``, record new ones.

    Raises:
        SecondConfirmationError: If another try of an arm, or another plan, was recorded.
        ValueError: If a file is damaged, so that it is unknown what the test side was used for.
    """
    one = study.confirmation
    for arm, trial in winners.items():
        own = dataclasses.asdict(trial) | {"trial": trial.name, "epochs": one.epochs, "seeds": one.seeds}
        plan = json.loads(json.dumps({key: value for key, value in own.items() if key != "name"}))
        path = results / arm / "confirmations.jsonl"
        if record:
            append_lines(path, lambda lines, plan=plan: [] if lines else [plan])
        lines = read_lines(path)
        if len(lines) > 1 or not all("trial" in line for line in lines):
            raise ValueError(f"{path}: one line is needed, that of the winner")
        for line in lines:
            there = {"loss": LOSS, **line}
            if there != {**there, **plan}:
                raise SecondConfirmationError(
                    f"the test side was used to confirm {line['trial']}, as {path} says; "
                    f"confirming {trial.name} by another plan would be choosing by it"
                )


def compared(study: Study, winners: Mapping[str, Trial]) -> dict[str, Trial]:
    """Return what is confirmed, by name: the winners, and the recipe where it is trained along."""
    return {**winners, **({} if RECIPE in winners.values() else study.along)}


def needed(study: Study, winners: Mapping[str, Trial]) -> list[Attempt]:
    """Return the trainings of the confirmation, seed by seed."""
    return study.attempts(compared(study, winners).values(), study.confirmation, TEST)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A confirmation of all arms."""

    comparison: Comparison
    tests: dict[Pair, Difference]  # the primary tests, in the study's score, corrected together
    others: dict[tuple[Pair, str], Difference]  # the secondary ones, by measure, corrected together
    measures: list[scores.Measure]  # the secondary measures; empty: objective.SCORES


def outcome(study: Study, winners: Mapping[str, Trial], find: Find) -> Outcome | None:
    """Return the comparison of the arms; None as long as a record is missing.

    The recipe, where it is trained along, is no arm: its comparisons are secondary.
    """
    wanted = needed(study, winners)
    records = find(wanted)
    if any(one not in records for one in wanted):
        return None
    trials = compared(study, winners)
    comparison = Comparison(study, trials, study.confirmation, TEST, records)
    pairs = [(name, REFERENCE) for name in trials]
    if study.rival in trials:
        pairs += [(name, study.rival) for name in trials if name != study.rival]
    counted = [pair for pair in pairs if not {*pair} & {*study.along}]
    measures = _measures(study, comparison) if study.whole else []
    tests = {pair: comparison.difference(*pair, SCORES[study.score]) for pair in counted}
    read: dict[str, Score] = {one.name: one for one in measures} or SCORES
    others = {
        (pair, name): comparison.difference(*pair, score)
        for pair in (pairs[: len(winners)] if study.whole else pairs)
        for name, score in read.items()
        if study.whole or name != study.score or pair not in counted
    }
    return Outcome(comparison, _corrected(tests), _corrected(others), measures)


def _corrected(family: Mapping[Key, Difference | None]) -> dict[Key, Difference]:
    return correct({key: difference for key, difference in family.items() if difference is not None})


def _measures(study: Study, comparison: Comparison) -> list[scores.Measure]:
    """Return the measures that all models have, without the one that is tested."""
    kept = [of for name, of in comparison.records.items() if name not in comparison.lost]
    records = [record for of in kept for record in of.values()]
    tasks = sorted(set.intersection(*(set(record["metrics"]) for record in records))) if records else []
    sets = [name for name in scores.LABELLED_SETS if f"zero-shot/{name}" in tasks]
    probed = [name for name in scores.LABELLED_SETS if f"probe/{name}" in tasks]
    found = [*map(scores.retrieval_both_ways, scores.RECALLS), *scores.zero_shot(sets), *scores.shifts(tasks)]
    found += [*scores.mean_probe(probed), *scores.geometry(), *_AGREEMENT]
    tested = scores.retrieval_both_ways("R@10") if study.score == RECALL else None
    return [m for m in found if m != tested and all(m(one) is not None for one in records)]
