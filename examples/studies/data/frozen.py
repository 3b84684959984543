"""Flickr8k as two frozen encoders see it: what heads are trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from studies.records import Record
from studies.students import heads
from studies.students.heads import Setting
from studies.students.measure import Metrics, Model, measure, recorded

from .features import Side, cached, standardised
from .flickr8k import SPLITS, read


class Frozen:
    """The features by side, and the trainings of heads on them."""

    def __init__(self, folder: Path, train_pictures: int) -> None:
        self.photographs = read(folder)
        cache = cached(self.photographs, train_pictures)
        self.names = self.photographs.used(train_pictures)
        self.sides = standardised({side: cache.side(self.names[side]) for side in SPLITS})
        blocks = [path.stem for side in SPLITS for path in cache.blocks(self.names[side])]
        content = "\n".join([*blocks, *map(str, self.photographs.judgements)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def measured(self, model: Model, side: str, features: Side | None = None) -> Metrics:
        """Measure a model of these features, or of other ones, on a side."""
        judgements = self.photographs.judgements if side == "test" else None
        return measure(model, features or self.sides[side], self.names[side], judgements)

    def train(self, setting: Setting) -> Record:
        """Train and measure heads."""
        return recorded(
            lambda: heads.train(setting, self.sides["train"]),
            lambda model: self.measured(model, setting.side),
        )
