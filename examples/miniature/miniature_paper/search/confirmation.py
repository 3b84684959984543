"""The one look at the test side: the winner and the recipe against plain CLIP, with fresh seeds.

What is confirmed is written down before its first training. From then on another setting is refused, so that
the test side cannot be used to choose; whoever insists gets seeds of his own, and the report says so.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from miniature_paper.statistics import Difference, correct, paired_difference
from miniature_paper.store import write_whole

from .ladder import Find, Records, Standing, stand
from .objective import OBJECTIVE, SCORES
from .trials import RECIPE, TEST, Attempt, Round, Search, Trial, attempt, attempts

WITH_CLIP = "the setting less plain CLIP"
RECIPE_WITH_CLIP = "the recipe less plain CLIP"
WITH_RECIPE = "the setting less the recipe"


class SecondConfirmationError(RuntimeError):
    """The test side has been used already."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is to be confirmed, as it was written down.

    Attributes:
        number: Which confirmation it is, from 1.
        trial: The setting.
        epochs: How long it is trained.
        seeds: The seeds.
    """

    number: int
    trial: Trial
    epochs: int
    seeds: tuple[int, ...]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What is compared with plain CLIP."""
        return tuple(dict.fromkeys([self.trial, RECIPE]))

    def attempts(self, search: Search) -> list[Attempt]:
        """Return the trainings it takes."""
        return attempts(search, self.trials, self.epochs, self.seeds, TEST)


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """A confirmation with what came of it.

    Attributes:
        declaration: What was declared.
        missing: How many trainings are not there yet.
        standings: The winner and the recipe; empty as long as something is missing.
        primary: The winner's difference to plain CLIP in the objective, the one test that counts, so nothing
            is added by correcting it; None if it diverged.
        others: Every other difference by what is compared and score, corrected together.
    """

    declaration: Declaration
    missing: int
    standings: tuple[Standing, ...] = ()
    primary: Difference | None = None
    others: dict[tuple[str, str], Difference] = dataclasses.field(default_factory=dict)


class Declarations:
    """The declarations on disk, in a folder of the search's records."""

    def __init__(self, results: Path) -> None:
        self._folder = results / "confirmations"

    def all(self) -> list[Declaration]:
        """Return them in order.

        Raises:
            ValueError: If one is missing or damaged: then nobody knows how often the test side was used.
        """
        found = []
        paths = sorted(self._folder.glob("*.json"), key=lambda path: int(path.stem))
        for number, path in enumerate(paths, start=1):
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                changes = tuple((flag, value) for flag, value in stored["changes"])
                trial = Trial(stored["trial"], stored["factor"], changes)
                one = Declaration(stored["number"], trial, stored["epochs"], tuple(stored["seeds"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: is no declaration of a confirmation: {error!r}") from error
            if one.number != number:
                raise ValueError(f"{path}: declaration {number} is missing")
            found.append(one)
        return found

    def declare(self, search: Search, trial: Trial, find: Find, *, again: bool = False) -> Declaration:
        """Write down what is to be confirmed, or return what has been, if it is the same.

        Args:
            search: The search.
            trial: The winner.
            find: Returns the records of trainings.
            again: Allow a further confirmation. One that is declared and not finished is finished first, if
                it is of the same setting.

        Raises:
            SecondConfirmationError: If another setting was declared, and ``again`` is not given.
        """
        earlier = self.all()
        if earlier:
            last = earlier[-1]
            same = last.trial == trial
            needed = last.attempts(search)
            if same and (not again or len(find(needed)) < len(needed)):
                return last
            if not again:
                raise SecondConfirmationError(
                    f"the test side was used to confirm {last.trial.name}; confirming {trial.name} as well "
                    "would be choosing by it. --again does it with other seeds, and the report will say so"
                )
        number = len(earlier) + 1
        one = Declaration(number, trial, search.confirmation.epochs, search.confirmation_seeds(number))
        content = {
            "number": number,
            "trial": trial.name,
            "factor": trial.factor,
            "changes": trial.changes,
            "epochs": one.epochs,
            "seeds": one.seeds,
        }
        write_whole(self._folder / f"{number}.json", content)
        return one


def confirm(search: Search, declaration: Declaration, find: Find) -> Confirmation:
    """Return what came of a confirmation, as far as its records are there."""
    needed = declaration.attempts(search)
    records = find(needed)
    missing = sum(a not in records for a in needed)
    if missing:
        return Confirmation(declaration, missing)
    size = Round(declaration.epochs, declaration.seeds, 1)
    standings = stand(search, declaration.trials, size, TEST, records)
    by_trial = {standing.trial: standing for standing in standings}
    mine, recipe = by_trial[declaration.trial], by_trial[RECIPE]
    family: dict[tuple[str, str], Difference] = {
        (WITH_CLIP, name): d for name, d in mine.differences.items() if name != OBJECTIVE
    }
    if declaration.trial != RECIPE:
        family |= {(RECIPE_WITH_CLIP, name): d for name, d in recipe.differences.items()}
        if mine.differences and recipe.differences:
            family |= _between(search, declaration, records)
    alone = correct({name: d for name, d in mine.differences.items() if name == OBJECTIVE})
    return Confirmation(declaration, 0, tuple(standings), alone.get(OBJECTIVE), correct(family))


def _between(search: Search, declaration: Declaration, records: Records) -> dict[tuple[str, str], Difference]:
    """The winner less the recipe: is it the better model, whatever plain CLIP does at its batch size?"""
    found = {}
    for name, score in SCORES.items():
        values: list[dict[Any, float]] = []
        for trial in (declaration.trial, RECIPE):
            values.append({})
            for seed in declaration.seeds:
                values[-1][seed] = score(records[attempt(search, trial, declaration.epochs, seed, TEST)])
        difference = paired_difference(*values)
        assert difference is not None  # they have the same seeds
        found[WITH_RECIPE, name] = difference
    return found
