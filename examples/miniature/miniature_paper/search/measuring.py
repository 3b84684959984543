"""One checkpoint → what the search looks at, on one side of the icons and on nothing else.

It runs in a process of its own: ``python -m miniature_paper.search.measuring JOB`` reads what to do from a
JSON file, and writes what it found into another one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from clip_evaluation import metrics
from clip_evaluation.model import ClipModel
from torch.nn.functional import normalize

from miniature_paper import grid
from miniature_paper.grid import Preset
from miniature_paper.measure import Embeddings, first_items, searched_items

from .trials import TEST, VALIDATION, Attempt

if TYPE_CHECKING:
    from icons_data.load import Icons

VERSION = 1  # to be raised whenever something else is measured: older records are then made anew
_TOP = 1


def measure(model: ClipModel, icons: Icons, preset: Preset, side: str) -> dict[str, Any]:
    """Measure a model on one side.

    Args:
        model: The model.
        icons: The data; of the held-out pictures only those of ``side`` are looked at.
        preset: How much is measured.
        side: ``validation`` or ``test``.

    Returns:
        ``metrics``, ``chance``, ``items``, and ``diverged``: whether the embeddings are not finite; then
        there are no scores.
    """
    if side not in (VALIDATION, TEST):
        raise ValueError(f"side: must be {VALIDATION} or {TEST}, got {side!r}")
    index, captions, image_of = searched_items(icons, side, preset.retrieval_items)
    sets = {name: one for name, one in icons.labelled.items() if not one.shift}
    classified = {name: first_items(one.side(side), preset.class_items) for name, one in sets.items()}
    embeddings = Embeddings(model, icons)
    embeddings.encode([index, *(items.index for items in classified.values())])
    images, texts = normalize(embeddings(index), dim=-1), model.text_features(captions)
    found: dict[str, Any] = {"metrics": {}, "chance": {}, "items": {}, "diverged": False}
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        return {**found, "diverged": True}

    def add(task: str, items: int, scores: dict[str, float], chance: dict[str, float]) -> None:
        found["items"][task] = items
        for part, values in (("metrics", scores), ("chance", chance)):
            found[part][task] = {name: round(value, 4) for name, value in values.items()}

    recall = metrics.retrieval(images, texts, image_of)
    guess = metrics.retrieval_chance(len(index), image_of)
    add(
        "retrieval",
        len(index),
        *({f"{w} R@{k}": x for w, at in r.items() for k, x in at.items()} for r in (recall, guess)),
    )
    for name, one in sets.items():
        items = classified[name]
        classifier = model.classifier(one.classes, one.templates)
        scores = normalize(embeddings(items.index), dim=-1) @ classifier
        right = metrics.accuracy_at_k(scores, torch.from_numpy(items.labels), (_TOP,))
        add(
            f"zero-shot/{name}",
            len(items.labels),
            {"top-1": right[_TOP]},
            {"top-1": metrics.chance(len(one.classes), (_TOP,))[_TOP]},
        )
    return found


def main(job: Path) -> None:
    """Do what a job file says."""
    from icons_data.load import load

    todo = json.loads(job.read_text(encoding="utf-8"))
    attempt = Attempt.of_record(todo["setting"])
    os.chdir(todo["output"])
    model = ClipModel(todo["model"], checkpoint=todo["checkpoint"], device=todo["device"])
    found = measure(model, load(todo["icons"]), grid.PRESETS[attempt.preset], attempt.side)
    Path(todo["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
