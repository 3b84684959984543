"""From records to choices: nothing here trains or draws a random number.

A plan is followed by asking for records. The first question without all of its answers ends the plan with
:class:`MissingError`; the runner does these trainings, and follows the plan again from its beginning.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import yaml

from .records import Record

Scores = Callable[[Sequence[Any]], list[float]]
"""The scores of settings; raises :class:`MissingError`."""


class MissingError(RuntimeError):
    """Trainings of a data set that have no record."""

    def __init__(self, data: str, settings: Sequence[Any]) -> None:
        super().__init__(f"{data}: {len(settings)} trainings are missing")
        self.data, self.settings = data, settings


class Find:
    """The records of a data set; a call returns those of settings, by setting."""

    def __init__(self, data: str, records: Mapping[Any, Record]) -> None:
        self.data, self.records = data, records

    def __call__(self, settings: Iterable[Any]) -> dict[Any, Record]:
        """Return the records.

        Raises:
            MissingError: If some have none.
        """
        wanted = list(dict.fromkeys(settings))
        if missing := [one for one in wanted if one not in self.records]:
            raise MissingError(self.data, missing)
        return {one: self.records[one] for one in wanted}

    def there(self, settings: Iterable[Any]) -> dict[Any, Record]:
        """Return the records of those settings that have one."""
        return {one: self.records[one] for one in settings if one in self.records}

    def scores(self, measure: Callable[[Record], float]) -> Scores:
        """Return a function that returns the scores of settings by a measure."""
        return lambda settings: [measure(record) for record in self(settings).values()]

    def means(self, measure: Callable[[Record], float], seeds: Sequence[int]) -> Scores:
        """Return a function that returns the scores of settings: means over seeds."""

        def of(settings: Sequence[Any]) -> list[float]:
            of_seeds = {
                one: [dataclasses.replace(one, seed=seed) for seed in seeds]
                for one in dict.fromkeys(settings)
            }
            records = self(itertools.chain(*of_seeds.values()))
            return [fmean(measure(records[each]) for each in of_seeds[one]) for one in settings]

        return of

    def arms(self, settings: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, dict[int, Record]]:
        """Return the records of the test by arm and seed, which are trained seed by seed."""
        wanted = {
            arm: [dataclasses.replace(one, seed=seed, side="test") for seed in seeds]
            for arm, one in settings.items()
        }
        records = self(sorted(itertools.chain(*wanted.values()), key=lambda one: one.seed))
        return {arm: {one.seed: records[one] for one in of} for arm, of in wanted.items()}


def read(path: Path, preset: str) -> SimpleNamespace:
    """Return the entries of a plan in YAML: those of all presets, and the preset's own under its name."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = {name: content.pop(name) for name in ("full", "quick")}[preset]
    return SimpleNamespace(**{**content, **own, "preset": preset})


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of some tries."""

    arm: str
    tries: dict[Any, float]

    @property
    def chosen(self) -> Any:
        """The try with the largest score, the first of equal ones."""
        return max(self.tries, key=self.tries.__getitem__)


def best_of(arm: str, tries: Iterable[Any], scores: Scores) -> Best:
    """Return the best of some tries."""
    wanted = list(tries)
    return Best(arm, dict(zip(wanted, scores(wanted), strict=True)))
