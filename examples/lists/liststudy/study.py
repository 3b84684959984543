"""The trainings of a task with their records: those that are missing are done, seed by seed."""

from __future__ import annotations

import dataclasses
import time

import torch
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.trainings import Trainings, by_seed
from photostudy.heads import Heads
from rich.console import Console

from . import plan
from .plan import Plan
from .task import Part, Task
from .train import Setting, start, train

_PACKAGES = {name: name for name in ("torch", "numpy", "scipy", "rankloss")}


@dataclasses.dataclass(frozen=True)
class Study(Trainings):
    """A task and the records of its trainings."""

    task: Task
    store: Store
    primary: str  # the measure by which settings are chosen
    _started: dict[tuple[int, int], Heads] = dataclasses.field(default_factory=dict)

    @property
    def data(self) -> str:
        """Fingerprint of the task's data."""
        return self.task.data

    def follow(self, sizes: Plan, console: Console) -> None:
        """Do every search, and then the trainings of the test, seed by seed."""
        torch.set_num_threads(1)  # so that sums keep one order
        while due := [
            one for search in plan.searches(sizes, self.primary, self.find).values() for one in search.due
        ]:
            self.do("Search", due, console)
        arms = plan.arms(sizes, plan.searches(sizes, self.primary, self.find))
        self.do("Test", by_seed(arms.values()), console)

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record."""
        parts = [self.task.choice] if setting.side == "choice" else list(self.task.tests)
        found = []
        starts = [self._start(part, setting) for part in parts]
        began = time.process_time()
        for part, started in zip(parts, starts, strict=True):
            found.append(part.measure(train(setting, part, started)))
        return {
            "setting": dataclasses.asdict(setting),
            "metrics": {name: [round(of[name], 4) for of in found] for name in found[0]},
            "chance": {},
            "items": self.task.items,
            "data": self.task.data,
            "processor_seconds": round(time.process_time() - began, 1),
            "conditions": conditions(_PACKAGES, threads=torch.get_num_threads()),
        }

    def _start(self, part: Part, setting: Setting) -> Heads:
        """Return the heads that every arm of a seed starts from."""
        key = setting.seed, id(part.pairs)
        if key not in self._started:
            self._started[key] = start(part.pairs, setting.seed, setting.start_epochs)
        return self._started[key]
