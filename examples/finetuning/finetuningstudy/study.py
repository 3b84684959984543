"""The trainings with their records: those that are missing are done, seed by seed."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import open_clip
import torch
from examples_common.files import kept
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.trainings import Trainings, by_seed
from rich.console import Console

from . import plan
from .plan import Plan
from .task import Task
from .train import Setting, build, fine_tune, measure, pretrain

_PACKAGES = {name: name for name in ("torch", "numpy", "open_clip_torch", "rankloss")}


@dataclasses.dataclass(frozen=True)
class Study(Trainings):
    """A task, the records of its trainings, and the folder that keeps its starting checkpoints."""

    task: Task
    store: Store
    checkpoints: Path

    @functools.cached_property
    def data(self) -> str:
        """Fingerprint of the task's data."""
        return self.task.data

    def follow(self, sizes: Plan, console: Console) -> None:
        """Do every search, and then the trainings of the test, seed by seed."""
        torch.set_num_threads(1)  # so that sums keep one order
        for arm in plan.ARMS:
            self.do(f"search of {arm}", list(plan.searches(sizes, self.find)[arm]), console)
        arms = plan.tests(sizes, plan.searches(sizes, self.find))
        self.do("test", by_seed(arms.values()), console)

    def record(self, setting: Setting) -> Record:
        """Fine-tune and measure a setting, and return its record."""
        part = self.task.parts[setting.side]
        start = self.start(setting)
        began = time.process_time()
        model = fine_tune(setting, start, part.new)
        trained = time.process_time()
        return {
            "setting": dataclasses.asdict(setting),
            "metrics": {name: round(value, 4) for name, value in measure(model, part).items()},
            "chance": {},
            "items": {name: len(of.pictures) for name, of in self.task.pairs.items()},
            "data": self.data,
            "processor_seconds": round(trained - began, 1),
            "conditions": conditions(_PACKAGES, threads=torch.get_num_threads()),
        }

    def start(self, setting: Setting) -> open_clip.CLIP:
        """Return the seed's starting checkpoint, which is trained once and kept."""
        path = self.checkpoints / f"{self.data}-{setting.pretraining}-seed{setting.seed}.pt"
        state = kept(path, lambda: pretrain(setting.seed, setting.pretraining, self.task.old).state_dict())
        model = build(setting.seed)
        model.load_state_dict(state)
        return model.eval()
