"""The trainings of a task with their records: those that are missing are done, seed by seed."""

from __future__ import annotations

import dataclasses
import time

import torch
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.trainings import Trainings, by_seed
from rich.console import Console

from . import plan
from .plan import Plan
from .task import Task
from .train import Setting, train

_PACKAGES = {name: name for name in ("torch", "numpy", "scipy", "rankloss")}


@dataclasses.dataclass(frozen=True)
class Study(Trainings):
    """A task and the records of its trainings."""

    name: str  # of the data
    task: Task
    store: Store

    @property
    def data(self) -> str:
        """Fingerprint of the task's data."""
        return self.task.data

    def follow(self, sizes: Plan, console: Console) -> None:
        """Do every search, and then the trainings of the test, seed by seed."""
        torch.set_num_threads(1)  # so that sums keep one order
        for arm in plan.ARMS:
            tries = plan.searches(sizes, self.name, self.find)[arm]
            self.do(f"{self.name}: search of {arm}", list(tries), console)
        arms = plan.arms(sizes, plan.searches(sizes, self.name, self.find))
        self.do(f"{self.name}: test", by_seed(arms.values()), console)

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record."""
        part = self.task.parts[setting.side]
        began = time.process_time()
        model, together = train(setting, part)
        trained = time.process_time()
        metrics = {**part.measure(model), "listed in batch": 100 * together}
        return {
            "setting": dataclasses.asdict(setting),
            "metrics": {name: round(value, 4) for name, value in metrics.items()},
            "chance": {},
            "items": self.task.items,
            "data": self.task.data,
            "processor_seconds": round(trained - began, 1),
            "conditions": conditions(_PACKAGES, threads=torch.get_num_threads()),
        }
