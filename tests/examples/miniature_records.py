"""Records of the miniature's schema for its tests: the committed ones with noise in place of a training."""

import asyncio
import dataclasses
import hashlib

import numpy as np
from miniature_paper import grid
from miniature_paper.data import Tables
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.records import Store
from miniature_paper.runs import Machine, MeasuringError, Workshop

_COMMITTED, _ = Store(EXAMPLE / "results" / "full").of(grid.plan(grid.PRESETS["full"]))
_FIRST = _COMMITTED[0]


def record(setting, *, effect=0.0, noise=0.4, points=60, pictures=2):
    """A record whose scores are noise that seeds share, noise of its own, and ``effect`` where not CLIP's.

    Args:
        setting: What it is the record of.
        effect: Points that every loss but CLIP has more in every score.
        noise: Standard deviation of what every model has of its own.
        points: Pairs in the picture of the embeddings, if the runner keeps one of this model.
        pictures: Pictures with heat maps, likewise.
    """
    own, shared = _rng(setting), _rng((setting.seed, setting.backbone))
    bonus = 0.0 if setting.loss == "clip" else effect

    def score(level):
        grown = level + np.log2(setting.pairs / 8960) + shared.normal(0, 0.6)
        return round(float(np.clip(grown + bonus + own.normal(0, noise), 0, 100)), 4)

    metrics = {
        task: {name: score(level) for name, level in levels.items()}
        for task, levels in _FIRST["metrics"].items()
    }
    geometry = _FIRST["metrics"]["geometry/test"]
    metrics["geometry/test"] = {name: level + own.normal(0, 0.01) for name, level in geometry.items()}
    metrics["geometry/test"]["modality_gap"] += 0.05 * bonus
    made = {
        **_FIRST,
        "setting": dataclasses.asdict(setting),
        "metrics": metrics,
        "conditions": {**_FIRST["conditions"], "jobs": 2},
    }
    del made["figures"]
    if grid.is_shown(setting):
        shown = next(r["figures"] for r in _COMMITTED if r["setting"] == made["setting"])
        umap = {modality: rows[:points] for modality, rows in shown["umap"].items()}
        made["figures"] = {"umap": umap, "heat_maps": shown["heat_maps"][:pictures]}
    return made


def records(settings, **options):
    """A record for every setting."""
    return [record(setting, **options) for setting in settings]


def workshop(output, results):
    """A workshop whose data are not there: for runs that are made up, too."""
    sizes = {pairs for preset in grid.PRESETS.values() for pairs in preset.sizes}
    tables = Tables(dict.fromkeys(sizes, "t"), dict.fromkeys(sizes, "d"))
    return Workshop(output, output, tables, Store(results), Machine("cpu", 2, 0, 1))


def fake_trainings(monkeypatch, command, record):
    """Give a command records in place of trainings; returns what was made, and the names that are to fail."""
    made, broken = [], set()

    async def make(self, one, key, report):
        report("training", 0.5)
        await asyncio.sleep(0)
        if one.name in broken:
            raise MeasuringError("out of luck")
        made.append(one)
        return record(one)

    monkeypatch.setattr(Workshop, "_record", make)
    monkeypatch.setattr(command, "prepare", lambda args, sizes, console: workshop(args.output, args.results))
    return made, broken


def _rng(key):
    return np.random.default_rng(int(hashlib.sha256(repr(key).encode()).hexdigest()[:12], 16))
