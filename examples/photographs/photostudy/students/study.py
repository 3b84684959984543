"""The trainings of a data set with their records: those that are missing are done, in the plan's order."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from clip_evaluation.metrics import retrieval_chance
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.trainings import Trainings
from rich.console import Console

from photostudy.measure import Metrics

from . import plan
from .data import DataSet
from .plan import Plan
from .train import Setting, train

_PACKAGES = {name: name for name in ("torch", "numpy", "scipy", "rankloss")}


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
        trainings = plan.arms(sizes, self.find).values()
        in_order = sorted((one for of in trainings for one in of), key=lambda one: one.seed)
        self.do(f"{self.of.name}: test", in_order, console)

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record."""
        began = time.process_time()
        model = train(setting, self.of.sides["train"], self.of.words)
        trained = time.process_time()
        metrics = self.of.measure(model, setting.side)
        shape = self.of.sides[setting.side].student.sentences.shape[:2]
        return recorded(setting, metrics, (shape[0], shape[1]), self.data, (began, trained))


def recorded(
    setting: Any, metrics: Metrics, shape: tuple[int, int], data: str, began: tuple[float, float]
) -> Record:
    """Return the record of a training.

    Args:
        setting: A dataclass.
        metrics: Of the side that was measured.
        shape: Numbers of its pictures, and of sentences of each.
        data: Fingerprint of the data.
        began: Processor seconds at which the training and the measuring began.
    """
    pictures, captions = shape
    chance = retrieval_chance(pictures, torch.arange(pictures).repeat_interleave(captions))
    training, measuring = began
    return {
        "setting": dataclasses.asdict(setting),
        "metrics": metrics,
        "chance": {
            "retrieval": {f"{way} R@{k}": value for way, of in chance.items() for k, value in of.items()}
        },
        "items": {"retrieval": pictures},
        "data": data,
        "processor_seconds": {
            "training": round(measuring - training, 1),
            "measuring": round(time.process_time() - measuring, 1),
        },
        "conditions": conditions(_PACKAGES, threads=torch.get_num_threads()),
    }
