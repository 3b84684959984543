"""The records of one preset, by model and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import grid, scores
from .grid import Setting
from .scores import Measure
from .statistics import Difference, Estimate, estimate, paired_difference

Record = Mapping[str, Any]


class Collection:
    """The records of what is planned by setting; others are counted and left alone.

    Raises:
        ValueError: If two records are of one setting, or a planned setting is of another preset.
    """

    def __init__(self, records: Sequence[Record], preset: grid.Preset, planned: Sequence[Setting]) -> None:
        strangers = [s.name for s in planned if s.preset != preset.name]
        if strangers:
            raise ValueError(f"planned: {strangers[0]} is not of the preset {preset.name}")
        self.preset = preset
        self.planned = dict.fromkeys(planned)
        found: dict[Setting, Record] = {}
        for record in records:
            setting = Setting(**record["setting"])
            if setting in found:
                raise ValueError(f"records: {setting.name} is there twice")
            found[setting] = record
        # In the plan's order.
        self.records = {setting: found[setting] for setting in self.planned if setting in found}
        self.unplanned = len(found) - len(self.records)

    @property
    def tasks(self) -> set[str]:
        """Every task that some record has, such as ``zero-shot/mdi``; all tasks before the first record."""
        found = {task for record in self.records.values() for task in record["metrics"]}
        return found or set(scores.TASKS)

    def sets(self, task: str) -> list[str]:
        """Return the labelled sets that were measured in ``zero-shot`` or ``probe``, by name."""
        return [name for name in scores.LABELLED_SETS if f"{task}/{name}" in self.tasks]

    def exhibit(self, name: str) -> Exhibited:
        """Return the models of one table or figure."""
        seeds = sorted({setting.seed for setting in self.planned})
        return Exhibited(self, grid.settings_of(self.preset, name, seeds))


class Exhibited:
    """The models of one exhibit, each with the seeds that this exhibit is planned with.

    A model is named by its setting with seed 0. A plan may hold a part of an exhibit: its other models are
    there, without any planned seed.
    """

    def __init__(self, collection: Collection, settings: Sequence[Setting]) -> None:
        self._settings: dict[Setting, list[Setting]] = {}
        for setting in settings:
            own = self._settings.setdefault(dataclasses.replace(setting, seed=0), [])
            own += [setting] if setting in collection.planned else []
        self._records = {
            model: {s.seed: collection.records[s] for s in own if s in collection.records}
            for model, own in self._settings.items()
        }
        self.models = list(self._settings)  # in the grid's order

    def planned(self, model: Setting) -> int:
        """Return how many seeds a model is to have here; none if it is not part of the plan."""
        return len(self._settings[model])

    def trained(self, model: Setting) -> int:
        """Return how many of them it has."""
        return len(self._records[model])

    def values(self, model: Setting, measure: Measure) -> dict[int, float]:
        """Return a measure by seed."""
        found = {seed: measure.of(record["metrics"]) for seed, record in self._records[model].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, model: Setting, measure: Measure) -> Estimate | None:
        """Return a measure's mean over the seeds; None without any."""
        values = self.values(model, measure)
        return estimate(list(values.values())) if values else None

    def difference(self, model: Setting, reference: Setting, measure: Measure) -> Difference | None:
        """Return the paired difference between two models; None if they share no seed."""
        return paired_difference(self.values(model, measure), self.values(reference, measure))

    def chance(self, measure: Measure) -> float | None:
        """Return what guessing scores: the same for every model whose record knows it."""
        found = (measure.of(record["chance"]) for own in self._records.values() for record in own.values())
        return next((value for value in found if value is not None), None)

    def items(self, measure: Measure) -> int | None:
        """Return the number of held-out items behind a measure, likewise."""
        found = (measure.items(record["items"]) for own in self._records.values() for record in own.values())
        return next((value for value in found if value is not None), None)
