"""The trainings of students with their records: those that are missing are done, in the plan's order."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from examples_common.records import Record, Store
from examples_common.trainings import Trainings, by_seed
from rich.console import Console
from torch import Tensor

import photostudy.study
from photostudy import heads
from photostudy.features import Side
from photostudy.folder import SENTENCES_PER_PICTURE
from photostudy.heads import Heads
from photostudy.measure import measure
from photostudy.plan import Changes
from photostudy.study import recorded

from . import losses, plan, views
from .plan import Plan
from .setting import Setting
from .teacher import Teacher

TEACHER = "teacher"  # the loss of its record


class Itself:
    """A model of features that are in the common space already."""

    log_scale = torch.zeros(())

    def pictures(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features

    def sentences(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


class Study(Trainings):
    """The features, the teacher, and the records of the trainings."""

    def __init__(self, of: photostudy.study.Study, sizes: Plan, base: Changes, store: Store) -> None:
        self.of, self.sizes, self.base, self.store = of, sizes, base, store
        self.ensemble = sizes.ensemble(base)
        self.teacher: Teacher = self.ensemble.of(of)

    @property
    def data(self) -> str:
        """Fingerprint of the features and of the teacher."""
        return self.ensemble.name(self.of.data)

    @property
    def locks(self) -> Path:
        """The folder of locks."""
        return self.of.photographs.folder / "locks"

    def follow(self, console: Console) -> None:
        """Measure the teacher, do every arm's tries, and then the trainings of the test, seed by seed."""
        title = f"part {self.sizes.part}"
        self.do(f"{title}: teacher", [of_teacher(self.sizes, self.base)], console)
        chosen = {}
        for name in self.sizes.arms:
            while (found := plan.choice(self.sizes, name, self.base, self.find)).due:
                self.do(f"{title}: tries of {name}", found.due, console)
            chosen[name] = found
        arms = plan.settings(self.sizes, self.base, chosen)
        self.do(f"{title}: test", by_seed(arms.values()), console)

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record; the teacher is there."""
        began = time.process_time()
        if setting.loss == TEACHER:
            model, side = Itself(), self.teacher.sides[setting.side]
        else:
            model, side = train(setting, self.of.sides["train"], self.teacher), self.of.sides[setting.side]
        trained = time.process_time()
        judgements = self.of.photographs.judgements if setting.side == "test" else None
        metrics = measure(model, side, self.of.names(setting.side), judgements)
        shape = (len(side.pictures), SENTENCES_PER_PICTURE)
        return recorded(setting, metrics, shape, self.data, (began, trained))


def of_teacher(sizes: Plan, base: Changes) -> Setting:
    """Return the setting of the teacher's record."""
    return Setting(TEACHER, sizes.teacher[0], "test", **base)


def train(setting: Setting, side: Side, teacher: Teacher) -> Heads:
    """Train a student, and return it in evaluation mode.

    A loss's own parameters are drawn apart from the student's: a seed's students start as the same one.
    """
    torch.manual_seed(setting.seed)
    loss = losses.build(setting, (teacher.sides["train"].pictures.shape[-1],) * 2)
    return heads.train(setting, side, loss=loss, seen=views.of(setting.view, teacher, side))
