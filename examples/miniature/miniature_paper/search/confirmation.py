"""The one look at the test side: the winner and the recipe against plain CLIP, with fresh seeds.

The setting to confirm is recorded before its first training. From then on another one is refused, so that the
test side cannot be used to choose. Whoever insists gets fresh seeds, and the report says so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from miniature_paper.records import append_lines, read_lines
from miniature_paper.statistics import Difference, correct, paired_difference

from .ladder import Find, Standing, stand
from .objective import OBJECTIVE
from .trials import LOSS, RECIPE, TEST, Attempt, Round, Search, Trial, attempts

WITH_CLIP = "the setting less plain CLIP"
RECIPE_WITH_CLIP = "the recipe less plain CLIP"
WITH_RECIPE = "the setting less the recipe"


class SecondConfirmationError(RuntimeError):
    """The test side has been used already."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is to be confirmed, as it was recorded."""

    number: int  # of the confirmation, from 1
    trial: Trial
    epochs: int
    seeds: tuple[int, ...]

    def trials(self, search: Search) -> tuple[Trial, ...]:
        """Return what is compared with plain CLIP."""
        return tuple(dict.fromkeys([self.trial, *search.recipe]))

    def attempts(self, search: Search) -> list[Attempt]:
        """Return the trainings it takes."""
        return attempts(search, self.trials(search), self.epochs, self.seeds, TEST)


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """A confirmation and its result."""

    declaration: Declaration
    missing: int  # number of trainings without a record
    standings: tuple[Standing, ...] = ()  # the winner and the recipe; empty as long as something is missing
    # The winner's difference to plain CLIP in the objective: the one test that counts, so it is not corrected
    # for the others. None if it diverged.
    primary: Difference | None = None
    # Every other difference, by what is compared and by score, corrected together.
    others: dict[tuple[str, str], Difference] = dataclasses.field(default_factory=dict)

    @property
    def against_recipe(self) -> Difference | None:
        """The winner's difference to the recipe in the objective, if there is one."""
        return self.others.get((WITH_RECIPE, OBJECTIVE))


class Declarations:
    """The declarations on disk, one line each, beside the search's records."""

    def __init__(self, results: Path) -> None:
        self._path = results / "confirmations.jsonl"

    def all(self) -> list[Declaration]:
        """Return them in order.

        Raises:
            ValueError: If one is missing or damaged: then nobody knows how often the test side was used.
        """
        lines, damaged = read_lines(self._path)
        if damaged:
            raise ValueError("\n".join(damaged))
        return [self._parsed(number, line) for number, line in enumerate(lines, start=1)]

    def _parsed(self, number: int, line: dict[str, Any]) -> Declaration:
        try:
            changes = tuple((flag, value) for flag, value in line["changes"])
            trial = Trial(line["trial"], line["factor"], changes, line.get("loss", LOSS))
            one = Declaration(line["number"], trial, line["epochs"], tuple(line["seeds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path}, line {number}: no declaration: {error!r}") from error
        if one.number != number:
            raise ValueError(f"{self._path}: declaration {number} is missing")
        return one

    def declare(self, search: Search, trial: Trial, find: Find, *, again: bool = False) -> Declaration:
        """Record what is to be confirmed, or return the declaration of the same setting.

        Args:
            search: The search.
            trial: The winner.
            find: Returns the records of trainings.
            again: Allow a further confirmation, once an earlier one of the same setting is finished.

        Raises:
            SecondConfirmationError: If another setting was declared, and ``again`` is not given.
        """
        earlier = self.all()
        if earlier:
            last = earlier[-1]
            needed = last.attempts(search)
            if last.trial == trial and (not again or len(find(needed)) < len(needed)):
                return last
            if not again:
                raise SecondConfirmationError(
                    f"the test side was used to confirm {last.trial.name}; confirming {trial.name} as well "
                    "would be choosing by it. --again does it with other seeds, and the report will say so"
                )
        number = len(earlier) + 1
        one = Declaration(number, trial, search.confirmation.epochs, search.confirmation_seeds(number))
        line = {
            "number": number,
            "trial": trial.name,
            "factor": trial.factor,
            "changes": trial.changes,
            "epochs": one.epochs,
            "seeds": one.seeds,
        } | ({} if trial.loss == LOSS else {"loss": trial.loss})
        append_lines(self._path, lambda lines: [line] if len(lines) == len(earlier) else [])
        return self.all()[number - 1]


def confirm(search: Search, declaration: Declaration, find: Find) -> Confirmation:
    """Return a confirmation's result, as far as its records are there."""
    needed = declaration.attempts(search)
    records = find(needed)
    missing = sum(a not in records for a in needed)
    if missing:
        return Confirmation(declaration, missing)
    size = Round(declaration.epochs, declaration.seeds, 1)
    standings = stand(search, declaration.trials(search), size, TEST, records)
    by_trial = {standing.trial: standing for standing in standings}
    mine, recipe = by_trial[declaration.trial], by_trial[RECIPE]
    family: dict[tuple[str, str], Difference] = {
        (WITH_CLIP, name): d for name, d in mine.differences.items() if name != OBJECTIVE
    }
    if declaration.trial != RECIPE:
        family |= {(RECIPE_WITH_CLIP, name): d for name, d in recipe.differences.items()}
        # Is it the better model, whatever plain CLIP does at its batch size?
        both = {name: (mine.values[name], recipe.values[name]) for name in mine.values if recipe.values}
        between = {(WITH_RECIPE, name): paired_difference(*pair) for name, pair in both.items()}
        family |= {pair: difference for pair, difference in between.items() if difference is not None}
    alone = correct({name: d for name, d in mine.differences.items() if name == OBJECTIVE})
    return Confirmation(declaration, 0, tuple(standings), alone.get(OBJECTIVE), correct(family))
