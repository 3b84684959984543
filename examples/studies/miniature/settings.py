"""Settings of the trainings, and the trainer's arguments that they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from openmoji_demo.trainer import Job, recipe

_HERE = Path(__file__).parent
# open_clip gives "vit" in a path a meaning. The teacher is no backbone of the exhibits.
MODELS = {name: _HERE / "models" / folder for name, folder in
          {"resnet": "resnet", "vit": "transformer", "teacher": "teacher"}.items()}  # fmt: skip
PACKAGES = ("open_clip_torch", "torch", "numpy", "rankloss")
AUGMENTATION = ("scale=(0.6,1.0)",)
WEIGHTS = {"rankclip": (1.0, 1.0), "rankclip-cross": (1.0, 0.0), "rankclip-in": (0.0, 1.0)}
# λ is set per step, so that its course does not depend on how many epochs a data size takes.
_BY_STEP = ("--rankclip-schedule-unit", "step")
_BATCH = "--batch-size"
# Options that are no flags of --loss rankclip: such a setting is trained by --loss ablation, see rivals.py.
_ABLATIONS = {f"--rankclip-{name}" for name in ("lists", "worth", "discount", "fixed-reference")}


def _yaml(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((_HERE / name).read_text(encoding="utf-8"))
    return content


PRESETS = {name: SimpleNamespace(name=name, **entries) for name, entries in _yaml("presets.yaml").items()}
PLANS = _yaml("studies.yaml")


def size_of(name: str) -> SimpleNamespace:
    """Return a preset's size; of ``teacher-full`` a study's, of ``teacher-full-teacher`` its teacher's."""
    study, _, rest = name.partition("-")
    if not rest:
        return SimpleNamespace(**{**vars(PRESETS[name]), "whole": False, "teacher": None})
    preset, _, is_teacher = rest.partition("-")
    own = PLANS[study][preset]
    teacher = None if is_teacher else own.get("teacher")
    pairs = own["teacher" if is_teacher else "size"]["pairs"]
    return SimpleNamespace(**{**vars(PRESETS[preset]), "pairs": pairs, "whole": True, "teacher": teacher})


def job(
    loss: str, backbone: str, words: tuple[str, ...], size: Any, *, batch: int, epochs: int, seed: int
) -> Job:
    """Return a training job; the warmup is the same share of the steps for every number of them."""
    warmup = round(size.pairs // batch * epochs * size.warmup / size.steps)
    own = recipe(loss, epochs=epochs, batch_size=batch, warmup=warmup, seed=seed, augmentation=AUGMENTATION)
    return Job(loss, epochs, f"models/{MODELS[backbone].name}", (*own, *words))


@dataclasses.dataclass(frozen=True)
class Setting:
    """Setting of a model in the paper's exhibits."""

    loss: str
    backbone: str
    pairs: int  # a smaller number is a part of a larger one
    lambda_cross: float  # multiplies λ in the cross-modal rank term; 0 for a loss without that term
    lambda_in: float  # the same for the in-modal term
    seed: int  # of initial weights, order of the data and crops: the same ones for every loss
    preset: str
    side = "test"

    @property
    def arm(self) -> str:
        """Everything but the seed."""
        return f"{self.loss}-{self.backbone}-{self.pairs}-cross{self.lambda_cross:g}-in{self.lambda_in:g}"

    def job(self) -> Job:
        """Return the training job, of the preset's steps whatever the number of pairs."""
        size, words = PRESETS[self.preset], []
        if self.loss == "alip":
            words += ["--alip-caption-key", "synthetic"]
        if self.loss in WEIGHTS:
            words += _BY_STEP
        if self.loss in ("rankclip", "rankclip-cross"):
            words += ["--rankclip-lambda-cross", f"{self.lambda_cross:g}"]
        if self.loss in ("rankclip", "rankclip-in"):
            words += ["--rankclip-lambda-in", f"{self.lambda_in:g}"]
        here = SimpleNamespace(**{**vars(size), "pairs": self.pairs})
        epochs = size.steps * size.batch_size // self.pairs
        return job(
            self.loss, self.backbone, tuple(words), here, batch=size.batch_size, epochs=epochs, seed=self.seed
        )


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One training of a comparison that was fixed before, and the side it is measured on."""

    trial: str  # the trial's name; plain CLIP's is "clip" with what it shares with the trial
    loss: str
    changes: tuple[tuple[str, str], ...]  # arguments that differ from the recipe's
    epochs: int
    seed: int
    side: str  # validation or test
    preset: str  # the size's name, see size_of
    backbone: str = "resnet"

    @property
    def arm(self) -> str:
        """Everything but side and seed."""
        return f"{self.epochs}ep-{self.trial}"

    @property
    def pairs(self) -> int:
        """Number of training pairs."""
        return int(size_of(self.preset).pairs)

    @property
    def whole(self) -> bool:
        """True if everything is measured that the exhibits have."""
        return size_of(self.preset).whole and self.side == "test"

    def job(self) -> Job:
        """Return the training job: whatever the batch size, the same pairs are seen."""
        size, changes = size_of(self.preset), dict(self.changes)
        batch = int(changes.pop(_BATCH, size.batch_size))
        words = [word for change in changes.items() for word in change]
        loss = self.loss
        if not changes.keys().isdisjoint(_ABLATIONS):
            loss, words = "ablation", [word.replace("--rankclip-", "--ablation-") for word in words]
        elif loss.startswith("rankclip"):
            words = [*_BY_STEP, *words]
        return job(loss, self.backbone, tuple(words), size, batch=batch, epochs=self.epochs, seed=self.seed)
