"""Made-up records of the miniature's schema, for its tests: nothing is trained."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import random

import numpy as np
from miniature_paper import grid, scores
from miniature_paper.data import Tables
from miniature_paper.records import Store
from miniature_paper.runs import Machine, Workshop
from PIL import Image

CLASSES = 20
ITEMS = {"retrieval/test": 5123}


def record(setting, *, effect=0.0, noise=0.4, points=60, pictures=2):
    """A record whose scores are noise that seeds share, noise of its own, and ``effect`` where not CLIP's.

    Args:
        effect: Points that every loss but CLIP has more in every score.
        noise: Standard deviation of what every model has of its own.
        points: Pairs in the picture of the embeddings, if the runner keeps one of this model.
        pictures: Pictures with heat maps, likewise.
    """
    own = _rng(setting)
    shared = _rng((setting.seed, setting.backbone))
    size = np.log2(setting.pairs / 8960)
    bonus = 0.0 if setting.loss == "clip" else effect
    metrics, chance, items = {}, {}, {}

    def add(task, names, levels, guess):
        n = ITEMS.get(task, 300 + len(task) * 40)
        items[task] = n
        made = [
            float(np.clip(level + size + shared.normal(0, 0.6) + bonus + own.normal(0, noise), 0, 100))
            for level in levels
        ]
        metrics[task] = {name: round(value, 4) for name, value in zip(names, made, strict=True)}
        chance[task] = dict(zip(names, guess, strict=True))

    recalls = [f"{way} {k}" for way in ("image_to_text", "text_to_image") for k in scores.RECALLS]
    for where in ("test", *scores.SHIFTS):
        add(f"retrieval/{where}", recalls, [7, 17, 25, 8, 19, 27], [0.02, 0.1, 0.2] * 2)
    tops = [*scores.TOPS, "mean per class"]
    for name in (*scores.LABELLED_SETS, *filter(None, scores.SHIFTS.values())):
        add(f"zero-shot/{name}", tops, [16, 30, 38, 14], [5.0, 15.0, 25.0, 5.0])
        if name in scores.LABELLED_SETS:
            add(f"probe/{name}", tops, [41, 60, 70, 38], [5.0, 15.0, 25.0, 5.0])
    metrics["geometry/test"] = {
        "alignment": 1.1 + own.normal(0, 0.01),
        "uniformity_image": -2.9,
        "uniformity_text": -3.0,
        "uniformity_cross": -2.5 + own.normal(0, 0.02),
        "modality_gap": 0.6 + 0.05 * bonus + own.normal(0, 0.01),
        "cross_modal_tau": 0.4 + own.normal(0, 0.01),
        "cross_modal_rho": 0.5,
        "in_modal_tau": 0.2 + own.normal(0, 0.01),
        "in_modal_rho": 0.3,
        "logit_scale": 14 + own.normal(0, 0.1),
    }
    chance["geometry/test"], items["geometry/test"] = {}, 5123
    made = {
        "setting": dataclasses.asdict(setting),
        "metrics": metrics,
        "chance": chance,
        "items": items,
        "seconds": {"training": 600.0, "measuring": 60.0},
        "conditions": {
            "open_clip": "3.3.0",
            "torch": "2.13.0",
            "rankloss": "0.1.0",
            "device": "cpu",
            "cpu": "A processor",
            "threads": 1,
            "jobs": 2,
        },
    }
    if grid.is_shown(setting):
        made["figures"] = {"umap": _umap(own, 0.4 + bonus, points), "heat_maps": _heat_maps(own, pictures)}
    return made


def workshop(output, results):
    """A workshop whose data are not there: for runs that are made up, too."""
    sizes = {pairs for preset in grid.PRESETS.values() for pairs in preset.sizes}
    tables = Tables(dict.fromkeys(sizes, "t"), dict.fromkeys(sizes, "d"))
    return Workshop(output, output, tables, Store(results), Machine("cpu", 2, 0, 1))


def records(settings, **options):
    """A record for every setting."""
    return [record(setting, **options) for setting in settings]


def _rng(key):
    return np.random.default_rng(int(hashlib.sha256(repr(key).encode()).hexdigest()[:12], 16))


def _umap(rng, distance, n):
    images = rng.normal(0, 1, (n, 2)) @ np.array([[1.5, 0.6], [0.0, 0.7]])
    texts = images * 0.8 + rng.normal(0, 0.5, (n, 2)) + 5 * distance
    return {"image": images.round(3).tolist(), "text": texts.round(3).tolist()}


def _heat_maps(rng, pictures):
    shapes = random.Random(0)
    made = []
    texts = ("account heart outline", "coffee cup", "paper plane", "grinning face", "red apple", "tent camp")
    for text in texts[:pictures]:
        pixels = np.full((32, 32, 3), 255, np.uint8)
        x, y = shapes.randint(2, 14), shapes.randint(2, 14)
        pixels[y : y + 14, x : x + 14] = [shapes.randint(0, 200) for _ in range(3)]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        made.append(
            {
                "image": base64.b64encode(file.getvalue()).decode(),
                "text": text,
                "map": rng.normal(0.02, 0.05, (8, 8)).round(4).tolist(),
            }
        )
    return made
