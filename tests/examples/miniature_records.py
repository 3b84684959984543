"""Records of the miniature's schema for its tests: the committed ones with noise in place of a training."""

import asyncio
import dataclasses
import random

from examples_common.records import Store
from examples_common.trainer import TrainingError
from miniature_paper import grid
from miniature_paper.data import Tables
from miniature_paper.runs import Machine, Workshop


def study_record(one, *, effects=None, noise=0.1, lost=(), salt=""):
    """A record of a study's training: what its seed gives, noise of its own (``salt`` varies it), effects.

    Effects are by the try's name, or by the side and the name: ``test recipe``. Tries in ``lost`` diverge.
    """
    own, shared = random.Random(f"{salt}{one.name}"), random.Random(one.seed)
    level = 20 + shared.gauss(0, 1) + own.gauss(0, noise)
    level += sum((effects or {}).get(name, 0.0) for name in (one.trial, f"{one.side} {one.trial}"))
    tilt = own.gauss(0, noise)
    ways = ("image_to_text", "text_to_image")
    metrics = {
        "retrieval/test" if one.whole else "retrieval": {
            f"{way} R@{k}": level + tilt for way in ways for k in (1, 5, 10)
        },
        **{f"zero-shot/{name}": {"top-1": level - tilt} for name in ("mdi", "solar")},
    }
    if one.whole:
        metrics["zero-shot/noto"] = {"top-1": 99.0}
        metrics["teacher/test"] = {"cross_modal_tau": 0.1, "in_modal_tau": 0.2}
    diverged = one.trial in lost
    return {
        "setting": dataclasses.asdict(one),
        "teacher": "B" if one.seed > 2005 else "A" if one.whole else None,
        "metrics": {} if diverged else metrics,
        "items": dict.fromkeys(metrics, 100),
        "chance": {},
        "diverged": diverged,
        "seconds": {"training": 100.0},
        "conditions": {"cpu": "A", "rankloss": "0.2.0"},
    }


def study_records(missing=(), **options):
    """A function that finds such a record of every training but those with a name in ``missing``."""
    return lambda needed: {one: study_record(one, **options) for one in needed if one.name not in missing}


def workshop(output, results):
    """A workshop whose data are not there: for runs that are made up, too."""
    sizes = {pairs for preset in grid.PRESETS.values() for pairs in preset.sizes}
    tables = Tables(dict.fromkeys(sizes, "t"), dict.fromkeys(sizes, "d"))
    return Workshop(output, output, tables, Store(results), Machine("cpu", 2))


def fake_trainings(monkeypatch, command, record=study_record):
    """Give a command records in place of trainings; returns what was made, and the names that are to fail."""
    made, broken = [], set()

    async def make(self, one, key, report):
        report("training", 0.5)
        await asyncio.sleep(0)
        if one.name in broken:
            raise TrainingError("out of luck")
        made.append(one)
        return record(one)

    monkeypatch.setattr(Workshop, "_record", make)
    monkeypatch.setattr(command, "prepare", lambda args, sizes, console: workshop(args.output, args.results))
    return made, broken
