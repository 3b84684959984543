"""The records of one preset, by model and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from . import grid, scores
from .grid import Setting
from .scores import Measure
from .statistics import Difference, Estimate, estimate, paired_difference

Record = Mapping[str, Any]
Value = TypeVar("Value")


def model_of(setting: Setting) -> Setting:
    """Return what the settings of all seeds of a model have in common: the one with seed 0."""
    return dataclasses.replace(setting, seed=0)


class Collection:
    """Records by model and seed.

    Args:
        records: Records, as the store has them; those that are not planned are counted and left alone.
        preset: The preset that the report is about.
        planned: Every setting that is to be trained.

    Raises:
        ValueError: If two records are of one setting, or a planned setting is of another preset.
    """

    def __init__(self, records: Sequence[Record], preset: grid.Preset, planned: Sequence[Setting]) -> None:
        strangers = [s.name for s in planned if s.preset != preset.name]
        if strangers:
            raise ValueError(f"planned: {strangers[0]} is not of the preset {preset.name}")
        self.preset = preset
        self.planned = list(dict.fromkeys(planned))
        self.seeds = sorted({setting.seed for setting in self.planned})
        wanted = set(self.planned)
        self._records: dict[Setting, Record] = {}
        self.unplanned = 0
        for record in records:
            setting = Setting(**record["setting"])
            if setting not in wanted:
                self.unplanned += 1
            elif setting in self._records:
                raise ValueError(f"records: {setting.name} is there twice")
            else:
                self._records[setting] = record

    @property
    def records(self) -> list[Record]:
        """The records that are planned, in the plan's order."""
        return [self._records[setting] for setting in self.planned if setting in self._records]

    @property
    def tasks(self) -> set[str]:
        """Every task that some record has, such as ``zero-shot/mdi``; all tasks before the first record."""
        if not self._records:
            return set(scores.TASKS)
        return {task for record in self._records.values() for task in record["metrics"]}

    def sets(self, task: str) -> list[str]:
        """Return the labelled sets that were measured in ``zero-shot`` or ``probe``, by name."""
        return [name for name in scores.LABELLED_SETS if f"{task}/{name}" in self.tasks]

    def record(self, setting: Setting) -> Record | None:
        """Return one model's record, if it is there."""
        return self._records.get(setting)

    def exhibit(self, name: str) -> Exhibited:
        """Return the models of one table or figure."""
        return Exhibited(self, grid.settings_of(self.preset, name, self.seeds))


class Exhibited:
    """The models of one exhibit, each with the seeds that this exhibit is planned with."""

    def __init__(self, collection: Collection, settings: Sequence[Setting]) -> None:
        self._collection = collection
        # A plan may hold a part of an exhibit: its other models are there, without any planned seed.
        wanted = set(collection.planned)
        self._settings: dict[Setting, list[Setting]] = {}
        for setting in settings:
            own = self._settings.setdefault(model_of(setting), [])
            own += [setting] if setting in wanted else []

    @property
    def models(self) -> list[Setting]:
        """The models, in the grid's order."""
        return list(self._settings)

    def planned(self, model: Setting) -> int:
        """Return how many seeds a model is to have here; none if it is not part of the plan."""
        return len(self._settings[model])

    def trained(self, model: Setting) -> int:
        """Return how many of them it has."""
        return sum(self._collection.record(setting) is not None for setting in self._settings[model])

    def values(self, model: Setting, measure: Measure) -> dict[int, float]:
        """Return a measure by seed."""
        found = {}
        for setting in self._settings[model]:
            record = self._collection.record(setting)
            value = None if record is None else measure.of(record["metrics"])
            if value is not None:
                found[setting.seed] = value
        return found

    def estimate(self, model: Setting, measure: Measure) -> Estimate | None:
        """Return a measure's mean over the seeds; None without any."""
        values = self.values(model, measure)
        return estimate(list(values.values())) if values else None

    def difference(self, model: Setting, reference: Setting, measure: Measure) -> Difference | None:
        """Return the paired difference between two models; None if they share no seed."""
        return paired_difference(self.values(model, measure), self.values(reference, measure))

    def chance(self, measure: Measure) -> float | None:
        """Return what guessing scores."""
        return self._first(lambda record: measure.of(record["chance"]))

    def items(self, measure: Measure) -> int | None:
        """Return the number of held-out items behind a measure."""
        return self._first(lambda record: measure.items(record["items"]))

    def _first(self, read: Callable[[Record], Value | None]) -> Value | None:
        """Return what the first record that knows it says: it is the same for every model."""
        settings = (setting for own in self._settings.values() for setting in own)
        records = (record for setting in settings if (record := self._collection.record(setting)) is not None)
        return next((value for record in records if (value := read(record)) is not None), None)
