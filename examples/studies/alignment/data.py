"""The data sets as a student sees them, and as two frozen encoders do."""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rankloss.metrics import alignment
from studies.data.features import FrozenEncoders, Side
from studies.data.pairs import numbered, vocabulary
from studies.data.sets import SECOND, SIDES, Source, sources
from studies.records import Record
from studies.students.measure import measure, recorded
from studies.students.student import Student, pixels
from studies.training import kept

from . import heads, students
from .pretrained import Pretrained, PretrainedSplits
from .setting import Setting
from .zero_shot import is_right

AFTER = " after "  # between the new pairs and those before
_ENCODED_TOGETHER = 64  # pictures


class Encoded:
    """A data set as a student sees it and as two frozen encoders do, and the trainings on it.

    Args:
        source: Before anything is computed.
        folder: Of what is computed once.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        words = vocabulary(text for of in source.captions["train"] for text in of)
        self.word_numbers, self.words = words, 2 + len(words)
        content = hashlib.sha256(repr([source.captions, source.judgements, source.classes]).encode())
        self.folder = folder / content.hexdigest()[:16]
        sides = (*SIDES, *sorted(source.captions.keys() - set(SIDES)))
        shown = kept(
            self.folder / "pixels.pt", lambda: {side: pixels(source.pictures(side)) for side in sides}
        )
        self.sides = {side: Side(shown[side], numbered(source.captions[side], words)) for side in sides}
        for side in sides:
            content.update(shown[side].numpy().tobytes())
        self.fingerprint = content.hexdigest()[:16]

    @functools.cache  # noqa: B019 (a data set is there as long as the process)
    def encoded(self, side: str) -> Side:
        """Return the encoders' unit-norm features of a side, ``[N, 1280]`` and ``[N, S, 384]``."""
        found = kept(self.folder / f"encoders-{side}.pt", functools.partial(self._encode, side))
        sentences = normalize(found["sentences"], dim=-1).unflatten(0, (len(found["pictures"]), -1))
        return Side(normalize(found["pictures"], dim=-1), sentences)

    def _encode(self, side: str) -> dict[str, Tensor]:
        """Compute the encoders' features of a side's pictures, and of all their captions in a row."""
        encoders, shown = FrozenEncoders(), self.source.pictures(side)
        starts = range(0, len(shown), _ENCODED_TOGETHER)
        pictures = [encoders.pictures(shown[start : start + _ENCODED_TOGETHER]) for start in starts]
        sentences = encoders.sentences([text for of in self.source.captions[side] for text in of])
        return {
            "pictures": torch.from_numpy(np.concatenate(pictures)),
            "sentences": torch.from_numpy(sentences),
        }

    def train(self, setting: Setting) -> Record:
        """Train and measure heads or a student, or only measure what is not trained."""
        if setting.arm in heads.ARMS:
            return heads.record(setting, self)
        return recorded(
            lambda: students.train(setting, self), lambda model: self.measure(model, setting.side)
        )

    @torch.inference_mode()
    def measure(self, model: Student, side: str) -> dict[str, dict[str, Any]]:
        """Return the metrics of a student on a side; with the test side also those of the second."""
        judgements = self.source.judgements if side == "test" else None
        of = self.sides[side]
        found: dict[str, Any] = measure(model, of, self.source.names.get(side, ()), judgements)
        v, t = model.pictures(of.pictures), model.sentences(of.sentences[:, 0])
        found["geometry"]["alignment"] = alignment(v, t).item()
        if classes := self.source.classes.get(side):
            right = is_right(model, v, classes, self.word_numbers)
            found["zero-shot"] = {"top-1": 100 * right.double().mean().item()}
        if side == "test" and SECOND in self.sides:
            found[SECOND] = measure(model, self.sides[SECOND], ())
        return found


class Splits:
    """The splits of a data set, each of which is made once, when it is first needed.

    Args:
        make: Returns a split.
    """

    def __init__(self, make: Callable[[int], Encoded]) -> None:
        self.of = functools.cache(make)

    def fingerprint(self, setting: Setting) -> str:
        """Return the fingerprint of a setting's split."""
        return self.of(setting.split).fingerprint

    def train(self, setting: Setting) -> Record:
        """Train and measure on a setting's split."""
        return self.of(setting.split).train(setting)


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Splits | PretrainedSplits]:
    """Return the data sets that are there.

    A name such as "emojis after icons-30000" is that of a CLIP of the latter on the pairs of the former.
    """
    folder = options.output / "alignment" / sizes.preset
    every = {name: _splits(make, folder / name) for name, make in sources(sizes.sizes, options).items()}
    found: dict[str, Splits | PretrainedSplits] = dict(every)
    for pair in sizes.pretrained:
        new, _, old = pair.partition(AFTER)
        found.pop(old, None)  # no data set of its own
        if {new, old} <= every.keys():
            found[pair] = PretrainedSplits(functools.partial(_pretrained, every[old], every[new]))
    return found


def _pretrained(old: Splits, new: Splits) -> Pretrained:
    """Return a CLIP of the pairs of one data set on those of another: of both the first split."""
    return Pretrained(old.of(0), new.of(0))


def _splits(make: Callable[[int], Source], folder: Path) -> Splits:
    """Return the splits of a data set, whose features are kept in a folder."""
    return Splits(lambda split: Encoded(make(split), folder))
