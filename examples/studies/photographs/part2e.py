"""Part 2e: ``--loss rankclip-encoders`` as it is shipped, on photographs, emojis and icons."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from rankloss_features.caching import Spec
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES
from rankloss_trainers.own_losses import RankClipEncoders
from studies.plan import Find, read
from studies.report import conditions_texts
from studies.runner import Study
from studies.statistics import Arms, correct

from . import part2c, part2d
from .data import DataSet
from .measure import PRIMARY
from .part2a import CLIP
from .part2d import SETS
from .student_losses import ENCODERS
from .train import Setting

GOAL = 1.5  # points on each data set
_HERE = Path(__file__).parent


class ShippedEncoders:
    """The teacher that ``--loss rankclip-encoders`` names, with its own way to read pictures."""

    name = f"{ENCODERS} {RankClipEncoders().teacher}"

    def __init__(self) -> None:
        spec = Spec.of(str(RankClipEncoders().teacher)).check()
        self._teacher = spec.load(torch.device("cpu"), batch_size=128)

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return features, ``[N, 1280]``."""
        samples = [
            Sample(n, "", "", functools.partial(Image.Image.copy, x), n) for n, x in enumerate(pictures)
        ]
        few = (samples[start : start + 8] for start in range(0, len(samples), 8))  # within the caches
        return np.concatenate([self._features(NAMES[0], of) for of in few])

    def sentences(self, sentences: Sequence[str]) -> np.ndarray:
        """Return features, ``[N, 384]``."""
        return self._features(NAMES[1], [Sample(n, "", text) for n, text in enumerate(sentences)])

    def _features(self, name: str, samples: list[Sample]) -> np.ndarray:
        encoder = self._teacher.encoders[name]
        one = dataclasses.replace(self._teacher, encoders={name: encoder})
        return one.encode({name: encoder.prepare(samples)}, torch.float32)[name].numpy()


def planned(preset: str) -> SimpleNamespace:
    """Return part 2d's data and starts, with part 2e's own seeds."""
    of_2d, own = (read(_HERE / f"part2{part}.yaml", preset) for part in "de")
    return SimpleNamespace(**{**vars(of_2d), **vars(own)})


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, DataSet]:
    """Return part 2d's data sets, as the shipped encoders see them."""
    return part2d.data(sizes, options, ShippedEncoders)


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], other: Any) -> dict[str, Any]:
    """Return the report's values."""
    own = part2d.found(sizes, finds, [ENCODERS])
    clip = part2d.found(sizes, other("photographs-2d")[1], [CLIP])
    arms = {name: Arms({**own[name].records, **clip[name].records}) for name in SETS}
    pair = (ENCODERS, CLIP)
    tests = correct({(name, pair): arms[name].difference(pair, PRIMARY) for name in SETS})
    found = {name: tests[name, pair] for name in SETS}
    return {
        "seeds": sizes.seeds,
        "options": ", ".join(f"`{name}={value}`" for name, value in RankClipEncoders.of({}).changed.items()),
        "missed": [name for name, d in found.items() if not (d.established and d.mean >= GOAL)],
        **part2c.tables(arms, tests, [pair]),
        "arms_head": ["arm", *SETS],
        "made": conditions_texts(record for of in arms.values() for record in of.all),
    }


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=_HERE,
        setting=Setting,
        plan=planned,
        records={name: f"part2e/{name}" for name in SETS},
        data=data,
        results=results,
        report="part2e",
    )
