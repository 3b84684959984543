"""One checkpoint → its scores and what the figures show of it.

It runs in a process of its own, so that its threads are its own: ``python -m miniature_paper.measure JOB``
reads what to do from a JSON file, and writes what it found into another one.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from clip_evaluation import metrics, probe
from clip_evaluation.geometry import geometry
from clip_evaluation.model import ClipModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .data import SIZE, small
from .grid import PRESETS, Preset, Setting, is_shown

if TYPE_CHECKING:
    from icons_data.load import Icons, Items

# All pairs of all held-out pictures would take half of the time that measuring takes.
_GEOMETRY_ITEMS = 2048
_GEOMETRY_ANCHORS = 512
_HEAT_MAPS_OF_EACH = 3  # pictures in black, and as many in colour


@dataclasses.dataclass
class Measured:
    """What is measured of one model.

    Attributes:
        metrics: By ``TASK/DATA`` and by the score's name.
        chance: What guessing would score, for the same names.
        items: How many items each task was measured on.
    """

    metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    chance: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    items: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, name: str, items: int, scores: dict[str, float], chance: dict[str, float]) -> None:
        """Add the scores of one task on one data set."""
        self.metrics[name] = {key: round(value, 4) for key, value in scores.items()}
        self.chance[name] = {key: round(value, 4) for key, value in chance.items()}
        self.items[name] = items


class Embeddings:
    """Encodes pictures once, however many tasks use them.

    Args:
        model: The model.
        icons: The data.
    """

    def __init__(self, model: ClipModel, icons: Icons) -> None:
        self.model = model
        self._icons = icons
        self._row = np.full(len(icons.images), -1, dtype=np.int64)
        self._features = torch.empty(0)

    def encode(self, index: Iterable[np.ndarray]) -> None:
        """Encode all these pictures, given by their records' numbers."""
        wanted = np.unique(np.concatenate(list(index)))
        self._features, _ = self.model.image_features(_Pictures(self._icons.images, wanted, self.model))
        self._row[wanted] = np.arange(len(wanted))

    def __call__(self, index: np.ndarray) -> Tensor:
        """Return the features, not normalised, of pictures that were encoded."""
        rows = self._row[index]
        if (rows < 0).any():
            raise KeyError(f"picture {int(index[rows.argmin()])} was not encoded")
        return self._features[torch.from_numpy(rows)]


class _Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: np.ndarray, index: np.ndarray, model: ClipModel) -> None:
        self._images, self._index, self._preprocess = images, index, model.preprocess

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index = int(self._index[number])
        return self._preprocess(small(self._images[index])), index


def measure(model: ClipModel, icons: Icons, preset: Preset, *, figures: bool) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: The model.
        icons: The data.
        preset: How much is measured.
        figures: Whether Figures 6 and 7 show this model.

    Returns:
        ``metrics``, ``chance``, ``items``, and ``figures`` if asked for.
    """
    found = Measured()
    blocks = {"test": "test", **{shift: f"{shift}/test" for shift in icons.shifts}}
    searched = {name: searched_items(icons, block, preset.retrieval_items) for name, block in blocks.items()}
    probes = {
        name: (
            first_items(one.train, preset.probe_items),
            first_items(one.validation, preset.probe_items // 2),
        )
        for name, one in icons.labelled.items()
        if not one.shift
    }
    classified = {name: first_items(one.test, preset.class_items) for name, one in icons.labelled.items()}
    embeddings = Embeddings(model, icons)
    embeddings.encode(
        [index for index, _, _ in searched.values()]
        + [items.index for items in classified.values()]
        + [items.index for pair in probes.values() for items in pair]
    )
    texts = {}
    for name, (index, captions, image_of) in searched.items():
        images = normalize(embeddings(index), dim=-1)
        texts[name] = model.text_features(captions)
        scores = metrics.retrieval(images, texts[name], image_of)
        guess = metrics.retrieval_chance(len(index), image_of)
        found.add(f"retrieval/{name}", len(index), _flat(scores), _flat(guess))
    index, captions, image_of = searched["test"]
    first = torch.tensor([True, *(image_of[1:] != image_of[:-1]).tolist()])
    images, first_texts = normalize(embeddings(index), dim=-1), texts["test"][first]
    shape = geometry(images[:_GEOMETRY_ITEMS], first_texts[:_GEOMETRY_ITEMS], max_anchors=_GEOMETRY_ANCHORS)
    found.add(
        "geometry/test",
        min(len(index), _GEOMETRY_ITEMS),
        {**shape, "logit_scale": model.logit_scale},
        {},
    )
    for name, one in icons.labelled.items():
        items = classified[name]
        labels = torch.from_numpy(items.labels)
        guess = _class_chance(len(one.classes))
        classifier = model.classifier(one.classes, one.templates)
        features = embeddings(items.index)
        found.add(
            f"zero-shot/{name}",
            len(labels),
            _class_scores(normalize(features, dim=-1) @ classifier, labels),
            guess,
        )
        if name in probes:
            result = probe.linear_probe(
                *(
                    (embeddings(part.index), torch.from_numpy(part.labels))
                    for part in (probes[name][0], items, probes[name][1])
                ),
                classes=len(one.classes),
                strengths=preset.probe_strengths,
            )
            found.add(f"probe/{name}", len(labels), _class_scores(result.scores, labels), guess)
    content: dict[str, Any] = dataclasses.asdict(found)
    if figures:
        chosen = slice(preset.umap_pairs)  # the order of the items is random
        content["figures"] = {
            "umap": umap_points(images[chosen], first_texts[chosen]),
            "heat_maps": heat_maps(model, icons),
        }
    return content


def searched_items(icons: Icons, block: str, limit: int) -> tuple[np.ndarray, list[str], Tensor]:
    """Return at most ``limit`` pictures of a block, their captions, and the picture of each caption."""
    data = icons.retrieval(block)
    kept = data.image_of < limit
    captions = [caption for caption, keep in zip(data.captions, kept, strict=True) if keep]
    return data.index[:limit], captions, torch.from_numpy(data.image_of[kept])


def first_items(items: Items, limit: int) -> Items:
    """Return the first items; their order is random, so they are a random sample."""
    return dataclasses.replace(
        items, images=items.images[:limit], labels=items.labels[:limit], index=items.index[:limit]
    )


def _flat(recall: dict[str, dict[int, float]]) -> dict[str, float]:
    return {f"{way} R@{k}": value for way, at in recall.items() for k, value in at.items()}


def _class_scores(scores: Tensor, labels: Tensor) -> dict[str, float]:
    top = {f"top-{k}": value for k, value in metrics.accuracy_at_k(scores, labels).items()}
    return {**top, "mean per class": metrics.mean_per_class_accuracy(scores, labels)}


def _class_chance(classes: int) -> dict[str, float]:
    guess = metrics.chance(classes, metrics.CLASS_KS)
    return {**{f"top-{k}": value for k, value in guess.items()}, "mean per class": guess[1]}


def umap_points(images: Tensor, texts: Tensor) -> dict[str, list[list[float]]]:
    """Return two-dimensional points of both modalities, embedded together by their cosines.

    Args:
        images: ``[N, D]``, unit-norm.
        texts: ``[N, D]``, unit-norm; row i belongs to image i.

    Returns:
        ``image`` and ``text``: N points each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns of its own seed and of its compiler's
        from umap import UMAP

        both = torch.cat([images, texts]).numpy()
        points = UMAP(
            n_neighbors=min(15, len(both) - 1), metric="cosine", random_state=0, n_jobs=1
        ).fit_transform(both)
    rows = [[round(float(x), 3), round(float(y), 3)] for x, y in points]
    return {"image": rows[: len(images)], "text": rows[len(images) :]}


def heat_maps(model: ClipModel, icons: Icons) -> list[dict[str, Any]]:
    """Return heat maps of held-out pictures for their captions: the same pictures for every model."""
    from .heat_maps import heat_map

    paper = float(model.preprocess(Image.new("RGB", (SIZE, SIZE), "white")).max())
    found = []
    for record in _mapped(icons):
        image = small(icons.images[record.index])
        text = model.text_features([record.caption])[0]
        cells = heat_map(
            model.model, model.preprocess(image).to(model.device), text.to(model.device), paper=paper
        )
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
    from icons_data.load import load

    todo = json.loads(job.read_text(encoding="utf-8"))
    setting = Setting(**todo["setting"])
    os.chdir(todo["output"])
    model = ClipModel(todo["model"], checkpoint=todo["checkpoint"], device=todo["device"])
    found = measure(model, load(todo["icons"]), PRESETS[setting.preset], figures=is_shown(setting))
    result = Path(todo["result"])
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
