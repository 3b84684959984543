"""The trainings of a data set with their records: those that are missing are done, in the plan's order."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from examples_common.records import Record, Store
from examples_common.trainings import Trainings, by_seed
from rich.console import Console

from photostudy.study import recorded

from . import plan
from .data import DataSet
from .plan import Plan
from .train import Setting, train


class Study(Trainings):
    """A data set and the records of its trainings."""

    def __init__(self, of: DataSet, store: Store) -> None:
        self.of, self.store = of, store

    @property
    def data(self) -> str:
        """Fingerprint of the data."""
        return self.of.data

    @property
    def locks(self) -> Path:
        """The folder of locks."""
        return self.of.locks

    def follow(self, sizes: Plan, console: Console) -> None:
        """Do CLIP's search, every arm's tries, and then the trainings of the test, seed by seed."""
        torch.set_num_threads(1)  # several processes share the cores, and sums keep one order
        while (search := plan.of_clip(sizes, self.find)).due:
            self.do(f"{self.of.name}: search of clip", search.due, console)
        for arm in plan.GRIDS:
            while (choice := plan.choice(sizes, arm, search.chosen, self.find)).due:
                self.do(f"{self.of.name}: tries of {arm}", choice.due, console)
        arms = plan.arms(sizes, self.find)
        self.do(f"{self.of.name}: test", by_seed(arms.values()), console)

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record."""
        began = time.process_time()
        model = train(setting, self.of.sides["train"], self.of.words)
        trained = time.process_time()
        metrics = self.of.measure(model, setting.side)
        shape = self.of.sides[setting.side].student.sentences.shape[:2]
        return recorded(setting, metrics, (shape[0], shape[1]), self.data, (began, trained))
