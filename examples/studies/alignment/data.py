"""The data sets as a student sees them, and as two frozen encoders do."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import normalize

from studies.captions.data import Source, Splits, sources
from studies.data.features import FrozenEncoders, Side
from studies.icons import package
from studies.records import Record
from studies.spread.data import SECOND, Measured, icons_of, vendor
from studies.students.measure import recorded
from studies.training import kept

from . import heads, students
from .pretrained import Pretrained, PretrainedSplits
from .setting import Setting

_ENCODED_TOGETHER = 64  # pictures
AFTER = " after "  # between the new pairs and those before
_DEV = 0.2  # of the vendors' concepts; a quarter is the test side


class Encoded(Measured):
    """A data set, and the features of two frozen encoders of all its sides."""

    @functools.cache  # noqa: B019 (a data set is there as long as the process)
    def encoded(self, side: str) -> Side:
        """Return the unit-norm features of a side's pictures and sentences."""
        if side == "train":
            return Side(self.teachers.rows("efficientnet"), self.teachers.rows("minilm"))
        found = kept(self.folder / f"encoders-{side}.pt", functools.partial(self._encode, side))
        sentences = normalize(found["sentences"], dim=-1).unflatten(0, (len(found["pictures"]), -1))
        return Side(normalize(found["pictures"], dim=-1), sentences)

    def _encode(self, side: str) -> dict[str, torch.Tensor]:
        encoders, shown = FrozenEncoders(), self.source.pictures(side)
        starts = range(0, len(shown), _ENCODED_TOGETHER)
        pictures = [encoders.pictures(shown[start : start + _ENCODED_TOGETHER]) for start in starts]
        sentences = encoders.sentences([text for of in self.source.captions[side] for text in of])
        return {
            "pictures": torch.from_numpy(np.concatenate(pictures)),
            "sentences": torch.from_numpy(sentences),
        }

    @property
    def searched(self) -> list[str]:
        """The sides that a model of the test side is measured on."""
        return ["test", SECOND] if SECOND in self.sides else ["test"]

    def train(self, setting: Setting) -> Record:
        """Train and measure heads or a student, or only measure what is not trained."""
        if setting.arm in heads.ARMS:
            return heads.record(setting, self)
        return recorded(
            lambda: students.train(setting, self), lambda model: self.measure(model, setting.side)
        )


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Splits | PretrainedSplits]:
    """Return the data sets that are there; those of the icons' package are, if the icons are.

    A name such as "emojis after icons-30000" is that of a CLIP of the latter on the pairs of the former.
    """
    made = sources({name: size for name, size in sizes.sizes.items() if not isinstance(size, str)}, options)
    for name in made:
        if name.startswith("icons"):
            made[name] = functools.partial(icons_of, options.icons, sizes.sizes[name])
    if (options.icons / "manifest.json").is_file():
        tarball = package.fetch(options.icons / "cache")
        vendors = {name: prefix for name, prefix in sizes.sizes.items() if isinstance(prefix, str)}
        made |= {
            name: functools.partial(vendor, tarball, prefix, dev=_DEV) for name, prefix in vendors.items()
        }
    found: dict[str, Splits | PretrainedSplits] = {
        name: _splits(make, options.output / "alignment" / sizes.preset / name) for name, make in made.items()
    }
    before = {}
    for pair in sizes.pretrained:
        new, _, old = pair.partition(AFTER)
        if {new, old} <= found.keys():
            both = [functools.partial(found[name].of, 0) for name in (old, new)]
            before[pair] = PretrainedSplits(functools.partial(_pretrained, *both))
    trained_before = {pair.partition(AFTER)[2] for pair in sizes.pretrained}
    return {name: of for name, of in (found | before).items() if name not in trained_before}


def _pretrained(old: Callable[[], Encoded], new: Callable[[], Encoded]) -> Pretrained:
    return Pretrained(old(), new())


def _splits(make: Callable[[int], Source], folder: Path) -> Splits:
    return Splits(lambda split: Encoded(make(split), folder))
