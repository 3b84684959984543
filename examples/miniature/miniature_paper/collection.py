"""The records of one preset, by model and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from examples_common.statistics import Difference, Estimate, estimate, paired_difference

from . import grid, scores
from .grid import Setting

Record = Mapping[str, Any]
Score = Callable[[Record], float | None]
Value = TypeVar("Value")


class Compared:
    """Records by name and by seed: means over the seeds, and differences that are paired by them."""

    def __init__(self, records: Mapping[Any, Mapping[int, Record]]) -> None:
        self.records = records

    def values(self, name: Any, score: Score) -> dict[int, float]:
        """Return a score by seed, where a record has it."""
        found = {seed: score(record) for seed, record in self.records[name].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, name: Any, score: Score) -> Estimate | None:
        """Return a score's mean over the seeds; None without any."""
        values = self.values(name, score)
        return estimate(list(values.values())) if values else None

    def difference(self, name: Any, other: Any, score: Score) -> Difference | None:
        """Return the paired difference between two; None if they share no seed."""
        return paired_difference(self.values(name, score), self.values(other, score))


class Collection:
    """The records of what is planned by setting, in the plan's order; others are left alone."""

    def __init__(self, records: Sequence[Record], preset: grid.Preset, planned: Sequence[Setting]) -> None:
        self.preset, self.planned = preset, dict.fromkeys(planned)
        found = {Setting(**record["setting"]): record for record in records}
        self.records = {setting: found[setting] for setting in self.planned if setting in found}

    @property
    def tasks(self) -> set[str]:
        """Every task that some record has, such as ``zero-shot/mdi``."""
        return {task for record in self.records.values() for task in record["metrics"]}

    def sets(self, task: str) -> list[str]:
        """Return the labelled sets that were measured in ``zero-shot`` or ``probe``, by name."""
        return [name for name in scores.LABELLED_SETS if f"{task}/{name}" in self.tasks]

    def exhibit(self, name: str) -> Exhibited:
        """Return the models of one table or figure."""
        seeds = sorted({setting.seed for setting in self.planned})
        return Exhibited(self, grid.settings_of(self.preset, name, seeds))


class Exhibited(Compared):
    """The models of one exhibit, each with the seeds that this exhibit is planned with.

    A model is named by its setting with seed 0. A plan may hold a part of an exhibit: its other models are
    there, without any planned seed.
    """

    def __init__(self, collection: Collection, settings: Sequence[Setting]) -> None:
        self._settings: dict[Setting, list[Setting]] = {}
        for setting in settings:
            own = self._settings.setdefault(dataclasses.replace(setting, seed=0), [])
            own += [setting] if setting in collection.planned else []
        records = {
            model: {s.seed: collection.records[s] for s in own if s in collection.records}
            for model, own in self._settings.items()
        }
        super().__init__(records)
        self.models = list(self._settings)  # in the grid's order

    def planned(self, model: Setting) -> int:
        """Return how many seeds a model is to have here; none if it is not part of the plan."""
        return len(self._settings[model])

    def trained(self, model: Setting) -> int:
        """Return how many of them it has."""
        return len(self.records[model])

    def first(self, read: Callable[[Record], Value | None]) -> Value | None:
        """Return a value that all records agree on, such as chance or items; None if no record has it."""
        found = (read(record) for own in self.records.values() for record in own.values())
        return next((value for value in found if value is not None), None)
