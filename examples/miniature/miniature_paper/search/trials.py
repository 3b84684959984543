"""Tries: settings, and the single trainings of each.

A trial is the recipe with some of the trainer's arguments changed. It is compared with plain CLIP that has
the same changes as far as they concern CLIP, which is the batch size.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from examples_common.trainer import Job

from miniature_paper import grid
from miniature_paper.grid import BY_STEP, model_config, trained_model, training_recipe

BACKBONE = "resnet"
LOSS, REFERENCE = "rankclip", "clip"
VALIDATION, TEST = "validation", "test"
MEASURES = 1  # raise it when other things are measured: earlier records are then recomputed
_BATCH = "--batch-size"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting that is tried."""

    name: str
    factor: str  # what it varies; levels of one factor exclude each other
    changes: tuple[tuple[str, str], ...] = ()  # the trainer's arguments that differ from the recipe's
    loss: str = LOSS

    @property
    def command(self) -> str:
        """The changed arguments as they are typed."""
        return " ".join(word for change in self.changes for word in change)

    @property
    def shared(self) -> tuple[tuple[str, str], ...]:
        """The changes that plain CLIP is trained with, too."""
        return tuple(change for change in self.changes if change[0] == _BATCH)

    def __add__(self, other: Trial) -> Trial:
        """Both settings at once.

        Raises:
            ValueError: If they change the same argument.
        """
        if {flag for flag, _ in self.changes} & {flag for flag, _ in other.changes}:
            raise ValueError(f"{self.name} and {other.name} change the same argument")
        return Trial(
            f"{self.name}+{other.name}",
            f"{self.factor} + {other.factor}",
            tuple(sorted(self.changes + other.changes)),
        )


RECIPE = Trial("recipe", "none")


@dataclasses.dataclass(frozen=True)
class Size:
    """Common size of the attempts of one name."""

    preset: grid.Preset  # whose pairs, batch size and limits they have
    whole: bool = False  # whether the test side is measured with everything that the grid measures
    teacher: Attempt | None = None  # the model whose rankings the measured ones are compared with


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One training, and the side it is measured on."""

    trial: str  # the trial's name; plain CLIP's is "clip" with what it shares with the trial
    loss: str
    changes: tuple[tuple[str, str], ...]  # arguments that differ from the recipe's
    epochs: int
    seed: int
    side: str  # validation or test
    preset: str  # the size's name, which fixes everything else
    backbone: str = BACKBONE

    @classmethod
    def of_record(cls, stored: Mapping[str, Any]) -> Attempt:
        """Return the attempt that a record's ``setting`` describes."""
        changes = tuple((flag, value) for flag, value in stored["changes"])
        return cls(**{**stored, "changes": changes})

    @property
    def pairs(self) -> int:
        """Number of training pairs."""
        return SIZES[self.preset].preset.pairs

    @property
    def batch_size(self) -> int:
        """Pairs in a batch."""
        return int(dict(self.changes).get(_BATCH, SIZES[self.preset].preset.batch_size))

    @property
    def steps(self) -> int:
        """Optimizer steps: whatever the batch size, the same pairs are seen."""
        return self.pairs // self.batch_size * self.epochs

    @property
    def whole(self) -> bool:
        """True if everything is measured that the grid measures."""
        return SIZES[self.preset].whole and self.side == TEST

    @property
    def name(self) -> str:
        """A short name for people and files."""
        return f"{self.side}-{self.epochs}ep-{self.trial}-seed{self.seed}"

    def job(self) -> Job:
        """Return the training job."""
        preset = SIZES[self.preset].preset
        # The same share of the steps as in the grid.
        warmup = round(self.steps * preset.warmup / preset.steps)
        words = training_recipe(self.loss, self.epochs, self.batch_size, warmup, self.seed)
        if self.loss.startswith(LOSS):
            words += BY_STEP
        words += [word for change in self.changes if change[0] != _BATCH for word in change]
        return Job(self.loss, self.epochs, trained_model(self.backbone), tuple(words))

    def measured(self) -> dict[str, Any]:
        """Return what the measurements depend on, for the fingerprint."""
        size = SIZES[self.preset]
        limits = {name: getattr(size.preset, name) for name in ("retrieval_items", "class_items")}
        if not self.whole:
            return {"version": MEASURES, **limits}
        limits |= {name: getattr(size.preset, name) for name in ("probe_items", "probe_strengths")}
        teacher = teacher_folder(size.teacher) if size.teacher else None
        return {"version": [MEASURES, grid.MEASURES], **limits, "teacher": teacher}


def teacher_folder(teacher: Attempt) -> str:
    """Return the teacher's folder below the output, named by a fingerprint of what it is trained with."""
    content = [model_config(teacher.backbone), teacher.job().arguments, teacher.pairs]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    return f"teachers/{teacher.name}-{digest}"


def combine(helped: Sequence[Trial], limit: int) -> list[Trial]:
    """Combine settings of different factors that helped, given the most helpful first.

    Every combination of two and more of the first ``limit``, and all of them together if there are more.
    """
    first = sorted(helped[:limit], key=lambda trial: trial.name)
    groups = [group for size in range(2, len(first) + 1) for group in combinations(first, size)]
    if len(helped) > limit:
        groups.append(tuple(sorted(helped, key=lambda trial: trial.name)))
    return [functools.reduce(operator.add, group) for group in groups]


PLANS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8")
)
SIZE_NAMES = ("full", "quick")


def size_name(study: str, size: str) -> str:
    """Return the name in :data:`SIZES` of a study's size."""
    own = PLANS[study][size]["size"]
    return f"{study}-{size}" if "pairs" in own else str(own["preset"])


def _sizes() -> dict[str, Size]:
    sizes = {name: Size(preset) for name, preset in grid.PRESETS.items()}
    for study in PLANS:
        for size in SIZE_NAMES:
            own, label, teacher = PLANS[study][size], size_name(study, size), None
            if label in sizes:
                continue
            preset = grid.PRESETS[own["size"]["preset"]]
            if spec := own.get("teacher"):
                # Trained like its students, on more pairs and for longer; measured like them.
                taught = f"{label}-teacher"
                sizes[taught] = Size(dataclasses.replace(preset, name=taught, pairs=spec["pairs"]), True)
                budget = spec["epochs"], spec["seed"]
                teacher = Attempt("teacher", REFERENCE, (), *budget, TEST, taught, "teacher")
            preset = dataclasses.replace(preset, name=label, pairs=own["size"]["pairs"])
            sizes[label] = Size(preset, whole=True, teacher=teacher)
    return sizes


SIZES = _sizes()
