"""One checkpoint → its scores and what the figures show of it.

``python -m miniature_paper.measure JOB`` reads what to do from a JSON file and writes what it found to
another one. It is a process of its own, so that it has threads of its own.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_evaluation import metrics, probe
from clip_evaluation.geometry import geometry
from clip_evaluation.model import ClipModel
from icons_data.load import Icons, Items, LabelledSet, load
from icons_data.records import Record
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rankloss.metrics import kendall_tau

from .data import SIZE, small
from .grid import PRESETS, Preset, Setting, is_shown
from .heat_maps import heat_map
from .search.study import SIZES
from .search.trials import TEST, VALIDATION, Attempt

# All pairs of all held-out pictures would take half of the time that measuring takes.
_GEOMETRY_ITEMS = 2048
_GEOMETRY_ANCHORS = 512
_HEAT_MAPS_OF_EACH = 3  # pictures in black, and as many in colour


@dataclasses.dataclass
class Measured:
    """What is measured of one model: scores by ``TASK/DATA`` and by the score's name."""

    metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    chance: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # what guessing would score
    items: dict[str, int] = dataclasses.field(default_factory=dict)  # how many each task was measured on

    def add(self, task: str, items: int, scored: metrics.Scored) -> None:
        """Add the scores of one task on one data set, and what guessing would score."""
        self.metrics[task], self.chance[task] = (
            {name: round(pair[i], 4) for name, pair in scored.items()} for i in (0, 1)
        )
        self.items[task] = items


class Embeddings:
    """Encodes pictures once, however many tasks use them."""

    def __init__(self, model: ClipModel, icons: Icons) -> None:
        self.model, self._images = model, icons.images
        self._row = np.full(len(icons.images), -1, dtype=np.int64)
        self._features = torch.empty(0)

    def __call__(self, index: np.ndarray) -> Tensor:
        """Return the features, not normalised, of pictures that are given by their records' numbers."""
        new = np.unique(index[self._row[index] < 0])
        if len(new):
            pictures = [(self.model.preprocess(small(self._images[i])), int(i)) for i in new]
            features, _ = self.model.image_features(pictures)
            self._row[new] = len(self._features) + np.arange(len(new))
            self._features = torch.cat([self._features, features])
        return self._features[torch.from_numpy(self._row[index])]

    def zero_shot(self, one: LabelledSet, items: Items) -> Tensor:
        """Return the cosine of each item with each class of its set."""
        return normalize(self(items.index), dim=-1) @ self.model.classifier(one.classes, one.templates)


def measure(
    model: ClipModel, icons: Icons, preset: Preset, *, figures: bool, teacher: ClipModel | None = None
) -> dict[str, Any]:
    """Measure a model on the test side with everything, and how far it ranks as ``teacher`` does.

    Returns:
        ``metrics``, ``chance``, ``items``, and with ``figures`` what Figures 6 and 7 show of this model.
    """
    found, embeddings = Measured(), Embeddings(model, icons)
    pairs = {}
    for name in ("test", *icons.shifts):
        block = name if name == "test" else f"{name}/test"
        index, captions, image_of = searched_items(icons, block, preset.retrieval_items)
        images, texts = normalize(embeddings(index), dim=-1), model.text_features(captions)
        found.add(f"retrieval/{name}", len(index), metrics.named_recall(images, texts, image_of))
        first = torch.tensor([True, *(image_of[1:] != image_of[:-1]).tolist()])
        pairs[name] = images[:_GEOMETRY_ITEMS], texts[first][:_GEOMETRY_ITEMS]
    shape = geometry(*pairs["test"], max_anchors=_GEOMETRY_ANCHORS)
    shape["logit_scale"] = model.logit_scale
    found.metrics["geometry/test"] = {key: round(value, 4) for key, value in shape.items()}
    found.chance["geometry/test"], found.items["geometry/test"] = {}, len(pairs["test"][0])
    if teacher is not None:
        index, captions, image_of = searched_items(icons, "test", len(pairs["test"][0]))
        own = np.unique(image_of.numpy(), return_index=True)[1]  # each picture's first caption
        theirs = Embeddings(teacher, icons)(index), teacher.text_features([captions[i] for i in own])
        scores = teacher_agreement(pairs["test"], (normalize(theirs[0], dim=-1), theirs[1]))
        found.metrics["teacher/test"] = {key: round(value, 4) for key, value in scores.items()}
        found.chance["teacher/test"], found.items["teacher/test"] = {}, len(index)
    for name, one in icons.labelled.items():
        items = one.test.first(preset.class_items)
        scores, labels = embeddings.zero_shot(one, items), torch.from_numpy(items.labels)
        found.add(f"zero-shot/{name}", len(labels), metrics.named_accuracy(scores, labels))
        if not one.shift:
            train = one.train.first(preset.probe_items)
            validation = one.validation.first(preset.probe_items // 2)
            result = probe.linear_probe(
                *((embeddings(p.index), torch.from_numpy(p.labels)) for p in (train, items, validation)),
                classes=len(one.classes),
                strengths=preset.probe_strengths,
            )
            found.add(f"probe/{name}", len(labels), metrics.named_accuracy(result.scores, labels))
    content = dataclasses.asdict(found)
    if figures:
        # The order of the items is random.
        umap = umap_points(*(features[: preset.umap_pairs] for features in pairs["test"]))
        content["figures"] = {"umap": umap, "heat_maps": heat_maps(model, icons)}
    return content


def teacher_agreement(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], anchors: int = _GEOMETRY_ANCHORS
) -> dict[str, float]:
    """Return how far a student ranks the same pairs as its teacher does: Kendall's τ-b, the mean over lists.

    Args:
        student: Unit-norm features of images and texts, ``[N, D]`` each, row i of both being a pair.
        teacher: The same pairs' features, ``[N, D']`` each.
        anchors: So many evenly spaced pairs' lists are compared.

    Returns:
        ``cross_modal_tau``, of images' lists of texts and texts' lists of images, and ``in_modal_tau``.
    """
    rows = torch.linspace(0, len(student[0]) - 1, min(anchors, len(student[0]))).round().long()

    def tau(anchor: int, items: int) -> float:
        mine, theirs = (of[anchor][rows] @ of[items].T for of in (student, teacher))
        return float(kendall_tau(mine, theirs).nanmean())

    return {
        "cross_modal_tau": (tau(0, 1) + tau(1, 0)) / 2,
        "in_modal_tau": (tau(0, 0) + tau(1, 1)) / 2,
    }


def measure_side(model: ClipModel, icons: Icons, preset: Preset, side: str) -> dict[str, Any]:
    """Measure a model of the search on one side, and look at no held-out picture of another.

    Returns:
        ``metrics``, ``chance``, ``items``, and ``diverged``: whether the embeddings are not finite; then
        there are no scores.
    """
    if side not in (VALIDATION, TEST):
        raise ValueError(f"side: must be {VALIDATION} or {TEST}, got {side!r}")
    found = Measured()
    index, captions, image_of = searched_items(icons, side, preset.retrieval_items)
    sets = {name: one for name, one in icons.labelled.items() if not one.shift}
    embeddings = Embeddings(model, icons)
    images, texts = normalize(embeddings(index), dim=-1), model.text_features(captions)
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        return {**dataclasses.asdict(found), "diverged": True}
    found.add("retrieval", len(index), metrics.named_recall(images, texts, image_of))
    for name, one in sets.items():
        items = one.side(side).first(preset.class_items)
        scores, labels = embeddings.zero_shot(one, items), torch.from_numpy(items.labels)
        found.add(f"zero-shot/{name}", len(labels), metrics.named_accuracy(scores, labels, (1,)))
    return {**dataclasses.asdict(found), "diverged": False}


def searched_items(icons: Icons, block: str, limit: int) -> tuple[np.ndarray, list[str], Tensor]:
    """Return at most ``limit`` pictures of a block, their captions, and the picture of each caption."""
    data = icons.retrieval(block)
    kept = data.image_of < limit
    captions = [caption for caption, keep in zip(data.captions, kept, strict=True) if keep]
    return data.index[:limit], captions, torch.from_numpy(data.image_of[kept])


def umap_points(images: Tensor, texts: Tensor) -> dict[str, list[list[float]]]:
    """Return two-dimensional points of N unit-norm images and of their texts, embedded by their cosines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns about its own seed and its compiler
        from umap import UMAP

        both = torch.cat([images, texts]).numpy()
        neighbours = min(15, len(both) - 1)
        umap = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1)
        points = umap.fit_transform(both).astype(float).round(3).tolist()
    return {"image": points[: len(images)], "text": points[len(images) :]}


def heat_maps(model: ClipModel, icons: Icons) -> list[dict[str, Any]]:
    """Return heat maps of held-out pictures for their captions: the same pictures for every model."""
    paper = float(model.preprocess(Image.new("RGB", (SIZE, SIZE), "white")).max())
    found = []
    for record in _mapped(icons):
        image = small(icons.images[record.index])
        text = model.text_features([record.caption])[0].to(model.device)
        cells = heat_map(model.model, model.preprocess(image).to(model.device), text, paper=paper)
        png = io.BytesIO()
        image.save(png, format="PNG")
        rows = cells.cpu().double().numpy().round(4).tolist()
        shown = base64.b64encode(png.getvalue()).decode()
        found.append({"image": shown, "text": record.caption, "map": rows})
    return found


def _mapped(icons: Icons) -> Iterator[Record]:
    """Yield the first held-out pictures in black and in colour whose captions have two words or more."""
    fitting = [r for r in icons.part("test").records if r.retrieval and " " in r.caption]
    for palette in (False, True):
        yield from islice((r for r in fitting if r.palette == palette), _HEAT_MAPS_OF_EACH)


def _fingerprint(model: ClipModel) -> str:
    """Name a model by its weights: the same arguments give other bits on another machine."""
    digest = hashlib.sha256()
    for value in model.model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(job: Path) -> None:
    """Do what a job file says."""
    todo = json.loads(job.read_text(encoding="utf-8"))
    model = ClipModel(todo["model"], checkpoint=todo["checkpoint"], device=todo["device"])
    icons = load(todo["icons"])
    if "side" in todo["setting"]:
        attempt = Attempt.of_record(todo["setting"])
        preset = SIZES[attempt.preset].preset
        finite = all(bool(torch.isfinite(value).all()) for value in model.model.state_dict().values())
        if attempt.whole and finite:
            name = todo["teacher"]
            teacher = ClipModel(f"local-dir:{name}", device=todo["device"]) if name else None
            found = measure(model, icons, preset, figures=False, teacher=teacher)
            found["teacher"] = teacher and _fingerprint(teacher)
            found["diverged"] = not math.isfinite(found["metrics"]["geometry/test"]["alignment"])
        else:
            found = measure_side(model, icons, preset, attempt.side)
    else:
        setting = Setting(**todo["setting"])
        found = measure(model, icons, PRESETS[setting.preset], figures=is_shown(setting))
    Path(todo["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
