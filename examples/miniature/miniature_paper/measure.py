"""One checkpoint → its scores and what the figures show of it.

``python -m miniature_paper.measure JOB`` reads what to do from a JSON file and writes what it found to
another one. It is a process of its own, so that it has threads of its own.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_evaluation import metrics, probe
from clip_evaluation.geometry import geometry
from clip_evaluation.model import ClipModel
from icons_data.load import Icons, Items, LabelledSet, load
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .data import SIZE, small
from .grid import PRESETS, Preset, Setting, is_shown
from .heat_maps import heat_map
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
        self.model = model
        self._icons = icons
        self._row = np.full(len(icons.images), -1, dtype=np.int64)
        self._features = torch.empty(0)

    def __call__(self, index: np.ndarray) -> Tensor:
        """Return the features, not normalised, of pictures that are given by their records' numbers."""
        new = np.unique(index[self._row[index] < 0])
        if len(new):
            features, _ = self.model.image_features(_Pictures(self._icons.images, new, self.model))
            self._row[new] = len(self._features) + np.arange(len(new))
            self._features = torch.cat([self._features, features])
        return self._features[torch.from_numpy(self._row[index])]

    def zero_shot(self, one: LabelledSet, items: Items) -> Tensor:
        """Return the cosine of each item with each class of its set."""
        return normalize(self(items.index), dim=-1) @ self.model.classifier(one.classes, one.templates)


class _Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: np.ndarray, index: np.ndarray, model: ClipModel) -> None:
        self._images, self._index, self._preprocess = images, index, model.preprocess

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index = int(self._index[number])
        return self._preprocess(small(self._images[index])), index


def measure(model: ClipModel, icons: Icons, preset: Preset, *, figures: bool) -> dict[str, Any]:
    """Measure a model of the grid on the test side.

    Args:
        model: The model.
        icons: The data.
        preset: How much is measured.
        figures: Whether Figures 6 and 7 show this model.

    Returns:
        ``metrics``, ``chance``, ``items``, and with ``figures`` what the figures show.
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
    for name, one in icons.labelled.items():
        items = first_items(one.test, preset.class_items)
        scores, labels = embeddings.zero_shot(one, items), torch.from_numpy(items.labels)
        found.add(f"zero-shot/{name}", len(labels), metrics.named_accuracy(scores, labels))
        if not one.shift:
            train = first_items(one.train, preset.probe_items)
            validation = first_items(one.validation, preset.probe_items // 2)
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
        items = first_items(one.side(side), preset.class_items)
        scores, labels = embeddings.zero_shot(one, items), torch.from_numpy(items.labels)
        found.add(f"zero-shot/{name}", len(labels), metrics.named_accuracy(scores, labels, (1,)))
    return {**dataclasses.asdict(found), "diverged": False}


def searched_items(icons: Icons, block: str, limit: int) -> tuple[np.ndarray, list[str], Tensor]:
    """Return at most ``limit`` pictures of a block, their captions, and the picture of each caption."""
    data = icons.retrieval(block)
    kept = data.image_of < limit
    captions = [caption for caption, keep in zip(data.captions, kept, strict=True) if keep]
    return data.index[:limit], captions, torch.from_numpy(data.image_of[kept])


def first_items(items: Items, limit: int) -> Items:
    """Return the first items; their order is random, so they are a random sample."""
    return Items(items.images[:limit], items.labels[:limit], items.index[:limit])


def umap_points(images: Tensor, texts: Tensor) -> dict[str, list[list[float]]]:
    """Return two-dimensional points of both modalities, embedded together by their cosines.

    Args:
        images: ``[N, D]``, unit-norm.
        texts: ``[N, D]``, unit-norm; row i belongs to image i.

    Returns:
        ``image`` and ``text``: N points each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns about its own seed and its compiler
        from umap import UMAP

        both = torch.cat([images, texts]).numpy()
        neighbours = min(15, len(both) - 1)
        umap = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1)
        points = umap.fit_transform(both)
    rows = [[round(float(x), 3), round(float(y), 3)] for x, y in points]
    return {"image": rows[: len(images)], "text": rows[len(images) :]}


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
        found.append(
            {
                "image": base64.b64encode(png.getvalue()).decode(),
                "text": record.caption,
                "map": [[round(value, 4) for value in row] for row in cells.cpu().tolist()],
            }
        )
    return found


def _mapped(icons: Icons) -> Sequence[Any]:
    """Return the first held-out pictures in black and in colour whose captions have two words or more."""
    chosen = []
    for palette in (False, True):
        fitting = (
            record
            for record in icons.part("test").records
            if record.retrieval and record.palette == palette and " " in record.caption
        )
        chosen += [record for record, _ in zip(fitting, range(_HEAT_MAPS_OF_EACH), strict=False)]
    return chosen


def main(job: Path) -> None:
    """Do what a job file says."""
    todo = json.loads(job.read_text(encoding="utf-8"))
    model = ClipModel(todo["model"], checkpoint=todo["checkpoint"], device=todo["device"])
    icons = load(todo["icons"])
    if "side" in todo["setting"]:
        attempt = Attempt.of_record(todo["setting"])
        found = measure_side(model, icons, PRESETS[attempt.preset], attempt.side)
    else:
        setting = Setting(**todo["setting"])
        found = measure(model, icons, PRESETS[setting.preset], figures=is_shown(setting))
    Path(todo["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
