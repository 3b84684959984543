"""Successive halving: from the records to the trials that continue, and the trainings that are missing.

Nothing here trains or draws a random number: the same records lead to the same winner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from miniature_paper.statistics import Difference, Estimate, estimate, paired_difference

from .objective import OBJECTIVE, SCORES, diverged
from .trials import RECIPE, VALIDATION, Attempt, Round, Search, Trial, attempt, attempts, combine, reference

Records = Mapping[Attempt, Mapping[str, Any]]
Find = Callable[[Sequence[Attempt]], Records]


@dataclasses.dataclass(frozen=True)
class Standing:
    """A trial after a round."""

    trial: Trial
    values: dict[str, dict[int, float]]  # every score by seed; empty if it diverged
    levels: dict[str, Estimate]  # its own mean of every score; empty if it diverged
    reference: dict[str, Estimate]  # plain CLIP's
    differences: dict[str, Difference]  # paired, to plain CLIP; empty if it diverged

    @property
    def worth(self) -> float:
        """What trials are ordered by; one that diverged is below every other."""
        return self.differences[OBJECTIVE].mean if self.differences else float("-inf")


@dataclasses.dataclass(frozen=True)
class Step:
    """One round of the search."""

    round: Round
    trials: tuple[Trial, ...]
    attempts: tuple[Attempt, ...]  # the trainings it needs
    missing: tuple[Attempt, ...]  # those without a record
    standings: tuple[Standing, ...]  # the best first; empty as long as something is missing
    kept: tuple[Trial, ...]  # the trials that continue


def stand(search: Search, trials: Sequence[Trial], one: Round, side: str, records: Records) -> list[Standing]:
    """Compare trials with plain CLIP, seed by seed, and return them with the best one first.

    Equal ones are ordered by name, so the order of trials and records makes no difference.

    Raises:
        ValueError: If plain CLIP diverged: then nothing can be compared with it.
    """
    found = []
    for trial in trials:
        ours, theirs = (
            {seed: records[make(search, trial, one.epochs, seed, side)] for seed in one.seeds}
            for make in (attempt, reference)
        )
        if any(diverged(record) for record in theirs.values()):
            raise ValueError(f"plain CLIP, which {trial.name} is compared with, diverged")
        base = _scores(theirs)
        values = {} if any(diverged(record) for record in ours.values()) else _scores(ours)
        differences = {name: paired_difference(of, base[name]) for name, of in values.items()}
        found.append(
            Standing(
                trial,
                values,
                {name: estimate(list(of.values())) for name, of in values.items()},
                {name: estimate(list(of.values())) for name, of in base.items()},
                {name: d for name, d in differences.items() if d is not None},  # they have the same seeds
            )
        )
    return sorted(found, key=lambda standing: (-standing.worth, standing.trial.name))


def _scores(records: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    return {name: {seed: score(of) for seed, of in records.items()} for name, score in SCORES.items()}


def helped(standings: Sequence[Standing]) -> list[Trial]:
    """Return the best level of every factor that did better than the recipe, the most helpful first.

    Args:
        standings: The first round's, the best first.
    """
    recipe = next(standing for standing in standings if standing.trial == RECIPE)
    best: dict[str, Trial] = {}
    for standing in standings:
        if standing.worth > recipe.worth:
            best.setdefault(standing.trial.factor, standing.trial)
    return list(best.values())


def climb(search: Search, find: Find) -> list[Step]:
    """Return the rounds as far as the records reach; the last one is to be done next, or has the winner.

    In a search around the recipe, that goes through every round, even when it is not among the best: a
    stronger setting is one that is stronger than the recipe.
    """
    steps: list[Step] = []
    trials = search.trials
    for number, one in enumerate(search.rounds):
        needed = attempts(search, trials, one.epochs, one.seeds, VALIDATION)
        records = find(needed)
        missing = tuple(a for a in needed if a not in records)
        standings = () if missing else tuple(stand(search, trials, one, VALIDATION, records))
        kept = tuple(standing.trial for standing in standings[: one.keep] if standing.differences)
        steps.append(Step(one, tuple(trials), tuple(needed), missing, standings, kept))
        if missing:
            break
        new = combine(helped(standings), search.combined) if number == 0 and search.combined else []
        trials = tuple(dict.fromkeys([*search.recipe, *kept, *new]))
    return steps


def winner(search: Search, steps: Sequence[Step]) -> Trial | None:
    """Return the winner, or None as long as the search is not over.

    Raises:
        ValueError: If every trial of the last round diverged.
    """
    if not search.rounds:
        return search.trials[0]
    if len(steps) < len(search.rounds) or steps[-1].missing:
        return None
    if not steps[-1].kept:
        raise ValueError("every trial of the last round diverged: there is no winner")
    return steps[-1].kept[0]


def tried(steps: Sequence[Step]) -> list[Trial]:
    """Return every setting that was tried in any round."""
    return list(dict.fromkeys(trial for step in steps for trial in step.trials))
