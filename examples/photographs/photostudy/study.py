"""Trainings with their records: those that are missing are done, by as many processes as are started."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from clip_evaluation.metrics import retrieval_chance
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.terminal import bars, say
from examples_common.trainings import Trainings, shared
from rich.console import Console

from . import heads
from .features import Cache, Side, standardised
from .folder import SENTENCES_PER_PICTURE, SPLITS, Photographs
from .heads import Setting
from .measure import Metrics, measure

_PACKAGES = {name: name for name in ("torch", "numpy", "scipy", "rankloss")}
_SECONDS = {"clip": 0.7}, 1.1  # of one core, for an epoch of 6,000 pictures: plain CLIP; the others


@dataclasses.dataclass(frozen=True)
class Study(Trainings):
    """The features that heads are trained on, and the records of the trainings."""

    photographs: Photographs
    cache: Cache
    store: Store
    train_pictures: int

    def __post_init__(self) -> None:
        torch.set_num_threads(1)  # several processes share the cores, and sums keep one order

    def names(self, side: str) -> list[str]:
        """Return the pictures of a side that are used."""
        return self.photographs.used(self.train_pictures)[side]

    @cached_property
    def data(self) -> str:
        """Fingerprint of the features and of the experts' grades."""
        blocks = [path.stem for side in SPLITS for path in self.cache.blocks(self.names(side))]
        content = "\n".join([*blocks, *map(str, self.photographs.judgements)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def sides(self) -> dict[str, Side]:
        """The features by side."""
        return standardised({side: self.cache.side(self.names(side)) for side in SPLITS})

    def do(self, title: str, settings: Sequence[Setting], console: Console) -> None:
        """Train and measure the settings without a record; those of another process are waited for."""
        there = self.find(settings)
        waiting = [one for one in settings if one not in there]
        cost = f"about {sum(map(seconds, waiting)) / 60:.0f} minutes of one core"
        say(console, f"{title}: {len(settings)} trainings, {len(there)} of them finished already; {cost}")
        with bars(console) as progress:
            all_of_them = progress.add_task(title, total=sum(map(seconds, waiting)))
            for setting in shared(waiting, self.key, self.photographs.folder / "locks"):
                if not self.find([setting]):  # another process may have finished it
                    bar = progress.add_task(self.key(setting), total=setting.epochs)
                    record = self.record(setting, lambda _, bar=bar: progress.advance(bar))
                    self.store.save(self.key(setting), record)
                    progress.remove_task(bar)
                progress.advance(all_of_them, seconds(setting))

    def record(self, setting: Setting, on_epoch: Callable[[int], None] = lambda _: None) -> Record:
        """Train and measure a setting, and return its record."""
        started, side = time.process_time(), self.sides[setting.side]
        model = heads.train(setting, self.sides["train"], on_epoch)
        trained = time.process_time()
        judgements = self.photographs.judgements if setting.side == "test" else None
        metrics = measure(model, side, self.names(setting.side), judgements)
        shape = (len(side.pictures), SENTENCES_PER_PICTURE)
        return recorded(setting, metrics, shape, self.data, (started, trained))


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


def seconds(setting: Setting) -> float:
    """Return about how long a training takes on one core."""
    known, other = _SECONDS
    return known.get(setting.loss, other) * setting.epochs * setting.train_pictures / 6000
