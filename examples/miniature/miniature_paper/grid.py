"""Models to train: settings, the two presets, and the needs of each table and figure.

One setting is one trained model. Exhibits share settings: plain CLIP with seed 0 is in almost all of them
and is trained once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from examples_common.trainer import Job, recipe

LOSSES = ("clip", "cyclip", "alip", "rankclip", "rankclip-cross", "rankclip-in")
BACKBONES = ("resnet", "vit")
# Names of the tables and figures, on the command line and in the report.
EXHIBITS = ("table1", "table2", "table3", "table4", "figure3", "figure4", "figure6", "figure7")
MEASURES = 1  # raise it when measure.py measures differently: earlier records are then recomputed
AUGMENTATION = ("scale=(0.6,1.0)",)
# λ is set per step, so that its course does not depend on how many epochs a data size takes.
BY_STEP = ("--rankclip-schedule-unit", "step")

_MODELS = Path(__file__).resolve().parents[1] / "models"
# open_clip gives "vit" in a path a meaning. The teacher is no backbone of the grid.
_FOLDERS = {"resnet": "resnet", "vit": "transformer", "teacher": "teacher"}
_WEIGHTS = {"rankclip": (1.0, 1.0), "rankclip-cross": (1.0, 0.0), "rankclip-in": (0.0, 1.0)}


def model_folder(backbone: str) -> Path:
    """Return the folder of the architecture."""
    return _MODELS / _FOLDERS[backbone]


def model_config(backbone: str) -> dict[str, Any]:
    """Return the architecture."""
    text = (model_folder(backbone) / "open_clip_config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


@dataclasses.dataclass(frozen=True)
class Setting:
    """Setting of one model's training."""

    loss: str
    backbone: str
    pairs: int  # a smaller number is a part of a larger one
    lambda_cross: float  # multiplies λ in the cross-modal rank term; 0 for a loss without that term
    lambda_in: float  # the same for the in-modal term
    seed: int  # of initial weights, order of the data and crops: the same ones for every loss
    preset: str

    @property
    def name(self) -> str:
        """A short name for people and records."""
        name = f"{self.loss}-{self.backbone}-{self.pairs}"
        if (self.lambda_cross, self.lambda_in) not in ((0.0, 0.0), *_WEIGHTS.values()):
            name += f"-cross{self.lambda_cross:g}-in{self.lambda_in:g}"
        return f"{name}-seed{self.seed}"

    def job(self) -> Job:
        """Return the training job."""
        preset = PRESETS[self.preset]
        epochs = preset.epochs(self.pairs)
        words = training_recipe(self.loss, epochs, preset.batch_size, preset.warmup, self.seed)
        if self.loss == "alip":
            words += ["--alip-caption-key", "synthetic"]
        if self.loss in _WEIGHTS:
            words += BY_STEP
        if self.loss in ("rankclip", "rankclip-cross"):
            words += ["--rankclip-lambda-cross", f"{self.lambda_cross:g}"]
        if self.loss in ("rankclip", "rankclip-in"):
            words += ["--rankclip-lambda-in", f"{self.lambda_in:g}"]
        return Job(self.loss, epochs, trained_model(self.backbone), tuple(words))

    def measured(self) -> dict[str, Any]:
        """Return what the measurements depend on, for the fingerprint."""
        limits = ("retrieval_items", "class_items", "probe_items", "probe_strengths", "umap_pairs")
        return {"version": MEASURES, **{name: getattr(PRESETS[self.preset], name) for name in limits}}


def training_recipe(loss: str, epochs: int, batch_size: int, warmup: int, seed: int) -> list[str]:
    """Return the arguments of every training in the miniature."""
    return recipe(
        loss, epochs=epochs, batch_size=batch_size, warmup=warmup, seed=seed, augmentation=AUGMENTATION
    )


def trained_model(backbone: str) -> str:
    """Return the architecture's folder below the one the trainer is started in."""
    return f"models/{_FOLDERS[backbone]}"


def loss_name(lambda_cross: float, lambda_in: float, otherwise: str) -> str:
    """Return the ``--loss`` whose rank terms have these weights; ``otherwise`` where there are none.

    Every model has exactly one name, by which it is found again: the sweep over λ ends in the ablations.
    """
    if lambda_cross and lambda_in:
        return "rankclip"
    if lambda_cross or lambda_in:
        return "rankclip-cross" if lambda_cross else "rankclip-in"
    return "clip" if otherwise in _WEIGHTS else otherwise


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of the whole experiment."""

    name: str
    note: str  # what the report says about it
    # Optimizer steps of every run, whatever its data size and loss: a whole number of epochs over each of the
    # sizes, since the trainer counts in epochs and drops an incomplete last batch.
    steps: int
    batch_size: int  # also the length of the ranked lists
    warmup: int  # steps over which the learning rate grows
    sizes: tuple[int, ...]  # numbers of training pairs, where they are the subject
    pairs: int  # the one used elsewhere
    seeds: int
    sweep_seeds: int  # seeds in the sweep over λ
    lambdas: tuple[float, ...]  # multipliers of λ in the sweep, each with the other one at 1
    retrieval_items: int  # upper limit of held-out pictures to search
    class_items: int  # upper limit of held-out pictures per labelled set
    probe_items: int  # upper limit of training pictures per labelled set for its probe
    probe_strengths: tuple[float, ...]  # what the probe's regularisation is chosen from
    umap_pairs: int  # pairs in the picture of the embeddings

    def epochs(self, pairs: int) -> int:
        """Return how often each of ``pairs`` is seen in the preset's steps."""
        return self.steps * self.batch_size // pairs


def _presets() -> dict[str, Preset]:
    content = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    return {
        name: Preset(name, **{key: tuple(v) if isinstance(v, list) else v for key, v in entries.items()})
        for name, entries in content.items()
    }


PRESETS = _presets()


def settings_of(preset: Preset, exhibit: str, seeds: Iterable[int]) -> list[Setting]:
    """Return the settings that one exhibit shows, seed by seed."""

    def model(loss: str, **changes: Any) -> Setting:
        setting = Setting(loss, "resnet", preset.pairs, *_WEIGHTS.get(loss, (0.0, 0.0)), 0, preset.name)
        return dataclasses.replace(setting, **changes)

    if exhibit == "table4":
        models = [model(loss, backbone=backbone) for backbone in BACKBONES for loss in ("clip", "rankclip")]
    elif exhibit == "figure3":
        weights = [(x, 1.0) for x in preset.lambdas] + [(1.0, x) for x in preset.lambdas]
        swept = (model(loss_name(c, i, "clip"), lambda_cross=c, lambda_in=i) for c, i in weights)
        models = [model("clip"), *swept]
    elif exhibit == "figure4":
        models = [model(loss, pairs=pairs) for pairs in preset.sizes for loss in ("clip", "rankclip")]
    else:
        models = [model(loss) for loss in LOSSES]
    limit = {"figure3": preset.sweep_seeds, "figure6": 1, "figure7": 1}.get(exhibit)
    shown = [seed for seed in seeds if limit is None or seed < limit]
    return list(dict.fromkeys(dataclasses.replace(one, seed=seed) for seed in shown for one in models))


def plan(
    preset: Preset, exhibits: Sequence[str] = EXHIBITS, seeds: Sequence[int] | None = None
) -> list[Setting]:
    """Return every setting to train, in an order that makes an interrupted run most useful.

    The models of Table 1 come first, seed by seed: Tables 2 and 3 and Figures 6 and 7 consist of them too.
    The other exhibits follow, again seed by seed. At any point all losses therefore have the same seeds, give
    or take one.
    """
    seeds = range(preset.seeds) if seeds is None else seeds
    wanted = [s for seed in seeds for exhibit in exhibits for s in settings_of(preset, exhibit, [seed])]
    return list(dict.fromkeys([*(s for s in settings_of(preset, "table1", seeds) if s in wanted), *wanted]))


def is_shown(setting: Setting) -> bool:
    """Say whether Figures 6 and 7 show this very model, so that its pictures are kept."""
    return setting in settings_of(PRESETS[setting.preset], "figure6", [0])
