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

from rankloss_features import sources
from rankloss_features.caching import Spec
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES
from rankloss_trainers.own_losses import RankClipEncoders
from studies import icons
from studies.plan import Find
from studies.report import conditions_texts
from studies.runner import Study
from studies.statistics import Arms, correct

from . import drawings, part2c
from .data import DataSet, Thumbnails, of_photographs
from .features import cached
from .folder import needed, read
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
        none = dict.fromkeys(("features", "image_weights", "spaces"))
        args = argparse.Namespace(**none, **spec._asdict(), batch_size=128)
        self._teacher = sources.load(sources.given(args), args, torch.device("cpu"))

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


def planned(sizes: SimpleNamespace, name: str, seed: int, arm: str = ENCODERS) -> dict[str, Setting]:
    """Return the training of a data set with a seed, by arm."""
    return {arm: Setting(arm, seed, "test", **sizes.start[name])}


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, DataSet]:
    """Return the three data sets; pixels and features that are missing are computed."""
    photographs, pictures = read(needed(options.data)), Setting(CLIP, 0, "test", **sizes.start["photographs"])
    caches = [cached(photographs, pictures.train_pictures, kind) for kind in (Thumbnails, ShippedEncoders)]
    sides = {
        "emojis": drawings.emojis(sizes.emojis),
        "icons": drawings.icons(icons.built(options.icons), *sizes.icons),
    }
    kept = options.output / "drawings"
    return {
        "photographs": of_photographs(*caches, pictures.train_pictures),
        **{name: drawings.data_set(of, kept, ShippedEncoders) for name, of in sides.items()},
    }


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], other: Any) -> dict[str, Any]:
    """Return the report's values."""
    records: dict[str, dict[str, dict[int, Any]]] = {name: {ENCODERS: {}, CLIP: {}} for name in SETS}

    def fill(arm: str, of: Mapping[str, Find]) -> None:
        for seed in sizes.seeds:  # a stop leaves whole seeds
            for name in SETS:
                one = planned(sizes, name, seed, arm)[arm]
                records[name][arm][seed] = of.get(name, Find(name, {}))([one])[one]

    fill(ENCODERS, finds)
    fill(CLIP, other("photographs-2d")[1])
    arms = {name: Arms(of) for name, of in records.items()}
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
        plan="part2e.yaml",
        records={name: f"part2e/{name}" for name in SETS},
        data=data,
        results=results,
        report="part2e",
    )
