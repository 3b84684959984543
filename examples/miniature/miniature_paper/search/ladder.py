"""Successive halving: from the records to the tries that continue, and the trainings that are missing.

Nothing here trains or draws a random number: the same records lead to the same winners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from examples_common.statistics import Difference, Estimate

from miniature_paper.collection import Compared, Score

from .objective import SCORES
from .study import Round, Study
from .trials import RECIPE, REFERENCE, VALIDATION, Attempt, Trial, combine

Records = Mapping[Attempt, Mapping[str, Any]]
Find = Callable[[Sequence[Attempt]], Records]


class Comparison(Compared):
    """Records of tries, by the names they have here, and of the plain CLIP that each is compared with."""

    def __init__(
        self, study: Study, trials: Mapping[str, Trial], one: Round, side: str, records: Records
    ) -> None:
        self.trials = trials
        self.clip = {name: study.reference(trial, one, 0, side).trial for name, trial in trials.items()}
        found: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in self.clip.values()}
        for name, trial in trials.items():
            found[name] = {seed: records[study.attempt(trial, one, seed, side)] for seed in one.seeds}
            for seed in one.seeds:
                found[self.clip[name]][seed] = records[study.reference(trial, one, seed, side)]
        super().__init__(found)
        # Models of which a seed diverged are excluded from every comparison.
        self.lost = [name for name, of in found.items() if any(one["diverged"] for one in of.values())]

    def difference(self, name: str, other: str, score: Score) -> Difference | None:
        """Return the paired difference to another one, or to a try's own plain CLIP; None if one is lost."""
        pair = name, self.clip[name] if other == REFERENCE else other
        return None if {*pair} & {*self.lost} else super().difference(*pair, score)


@dataclasses.dataclass(frozen=True)
class Standing:
    """A try after a round."""

    trial: Trial
    clip: Estimate  # plain CLIP's score
    differences: dict[str, Difference]  # to plain CLIP in every score; empty if it diverged
    score: str  # the study's

    @property
    def worth(self) -> float:
        """Key of the order of tries; one that diverged is below every other."""
        return self.differences[self.score].mean if self.differences else float("-inf")


@dataclasses.dataclass(frozen=True)
class Step:
    """An arm in a round."""

    round: Round
    trials: tuple[Trial, ...]
    attempts: tuple[Attempt, ...]  # the trainings it needs
    missing: tuple[Attempt, ...]  # those without a record
    standings: tuple[Standing, ...]  # the best first; empty as long as something is missing
    kept: tuple[Trial, ...]  # the tries that continue


def stand(study: Study, trials: Sequence[Trial], one: Round, records: Records) -> list[Standing]:
    """Compare tries with plain CLIP, seed by seed, and return them with the best one first.

    Equal ones are ordered by name, so the order of tries and records makes no difference.

    Raises:
        ValueError: If plain CLIP diverged: then nothing can be compared with it.
    """
    comparison = Comparison(study, {trial.name: trial for trial in trials}, one, VALIDATION, records)
    found = []
    for trial in trials:
        clip = comparison.clip[trial.name]
        if clip in comparison.lost:
            raise ValueError(f"plain CLIP, which {trial.name} is compared with, diverged")
        differences = {s: comparison.difference(trial.name, REFERENCE, score) for s, score in SCORES.items()}
        known = {name: d for name, d in differences.items() if d is not None}
        found.append(Standing(trial, comparison.estimate(clip, SCORES[study.score]), known, study.score))
    return sorted(found, key=lambda standing: (-standing.worth, standing.trial.name))


def helped(standings: Sequence[Standing]) -> list[Trial]:
    """Return the best level of every factor that did better than the recipe, the most helpful first."""
    recipe = next(standing for standing in standings if standing.trial == RECIPE)
    best: dict[str, Trial] = {}
    for standing in standings:
        if standing.worth > recipe.worth:
            best.setdefault(standing.trial.factor, standing.trial)
    return list(best.values())


def _take(study: Study, trials: tuple[Trial, ...], one: Round, find: Find) -> Step:
    needed = study.attempts(trials, one, VALIDATION)
    records = find(needed)
    missing = tuple(a for a in needed if a not in records)
    standings = () if missing else tuple(stand(study, trials, one, records))
    kept = tuple(standing.trial for standing in standings[: one.keep] if standing.differences)
    return Step(one, trials, tuple(needed), missing, standings, kept)


def _neighbours(study: Study, arm: str, step: Step, tried: Sequence[Trial]) -> list[Trial]:
    """Return what the best try of a round has beside it in its arm's grid and was never tried."""
    if arm not in study.grids or step.missing or not step.kept:
        return []
    left = len(study.arms[arm]) + study.extensions - len(tried)
    return [one for one in study.grids[arm].beside(step.kept[0]) if one not in tried][: max(left, 0)]


def climb(study: Study, arm: str, find: Find) -> list[Step]:
    """Return an arm's rounds as far as the records reach; the last is to be done next, or has the winner."""
    steps: list[Step] = []
    trials = study.arms[arm]
    tried = list(trials)
    for number, one in enumerate(study.rounds):
        step = _take(study, trials, one, find)
        while new := _neighbours(study, arm, step, tried):
            tried += new
            step = _take(study, (*step.trials, *new), one, find)
        steps.append(step)
        if step.missing:
            break
        standings, kept = step.standings, step.kept
        new = combine(helped(standings), study.combined) if number == 0 and study.combined else []
        trials = tuple(dict.fromkeys([*study.along.values(), *kept, *new]))
    return steps


def winner(study: Study, arm: str, steps: Sequence[Step]) -> Trial | None:
    """Return an arm's winner, or None as long as its rounds are not over.

    Raises:
        ValueError: If every try of the last round diverged.
    """
    if not study.rounds:
        return study.arms[arm][0]
    if len(steps) < len(study.rounds) or steps[-1].missing:
        return None
    if not steps[-1].kept:
        raise ValueError(f"{arm}: every try of the last round diverged, so there is no winner")
    return steps[-1].kept[0]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a study."""

    study: Study  # with the arms that are made of others' winners, as far as these are known
    steps: dict[str, list[Step]]  # the rounds of every arm
    winners: dict[str, Trial]  # of the arms whose rounds are over

    @property
    def over(self) -> bool:
        """True if every arm has its winner."""
        return len(self.winners) == len(self.study.names)

    @property
    def due(self) -> list[Attempt]:
        """The trainings that are missing in the rounds that every arm is in; those that arms share once."""
        return list(dict.fromkeys(one for of in self.steps.values() if of for one in of[-1].missing))


def progress(study: Study, find: Find) -> Progress:
    """Return the arms' rounds and winners, as far as the records reach."""
    steps: dict[str, list[Step]] = {}
    winners: dict[str, Trial] = {}
    for arm in study.names:
        if arm in study.together:
            one = study.together[arm]
            parts = [*study.rivals, *filter(None, [one.beside])]
            if not all(part in winners for part in parts):
                continue
            worth = {name: steps[name][-1].standings[0].worth for name in study.rivals}
            study = study.with_grid(one.grid(arm, study, winners, worth))
        steps[arm] = climb(study, arm, find)
        best = winner(study, arm, steps[arm])
        if best is not None:
            winners[arm] = best
    return Progress(study, steps, winners)
