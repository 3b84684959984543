"""One checkpoint → its scores and what the figures show of it."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from openmoji_demo import metrics
from openmoji_demo.model import ClipModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rankloss.metrics import alignment, kendall_tau, modality_gap, rank_agreement, uniformity
from studies.icons.load import Icons, Items
from studies.icons.records import Record

from . import probe
from .data import SIZE, small
from .heat_maps import heat_map
from .settings import Attempt, Setting, size_of

# With all held-out pictures, the geometry would take half of the measuring time.
_GEOMETRY_ITEMS = 2048
_GEOMETRY_ANCHORS = 512
_HEAT_MAPS_OF_EACH = 3  # pictures in black, and as many in colour


class Measurement:
    """Measures of one model: scores by ``TASK/DATA`` and by the score's name."""

    def __init__(self, model: ClipModel, icons: Icons, size: SimpleNamespace) -> None:
        self.model, self._icons, self._size = model, icons, size
        self.metrics: dict[str, dict[str, float]] = {}
        self.chance: dict[str, dict[str, float]] = {}  # what guessing would score
        self.items: dict[str, int] = {}  # how many each task was measured on
        self._row = np.full(len(icons.images), -1, dtype=np.int64)
        self._features = torch.empty(0)

    def content(self) -> dict[str, Any]:
        """Return it as a record has it."""
        return {"metrics": self.metrics, "chance": self.chance, "items": self.items}

    def add(self, task: str, items: int, scored: Mapping[str, float | tuple[float, float]]) -> None:
        """Add a task's scores, each alone or with what guessing would score."""
        found = {name: of if isinstance(of, tuple) else (of,) for name, of in scored.items()}
        self.metrics[task] = {name: round(of[0], 4) for name, of in found.items()}
        self.chance[task] = {name: round(of[1], 4) for name, of in found.items() if len(of) > 1}
        self.items[task] = items

    def features(self, index: np.ndarray) -> Tensor:
        """Return the features, not normalised, of pictures by their records' numbers; encodes each once."""
        new = np.unique(index[self._row[index] < 0])
        if len(new):
            pictures = [self.model.preprocess(small(self._icons.images[i])) for i in new]
            features = self.model.image_features(pictures)
            self._row[new] = len(self._features) + np.arange(len(new))
            self._features = torch.cat([self._features, features])
        return self._features[torch.from_numpy(self._row[index])]

    def retrieved(self, block: str, limit: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unit-norm features of a block's pictures and captions, and each caption's picture."""
        data = self._icons.retrieval(block)
        limit = self._size.retrieval_items if limit is None else limit
        kept = data.image_of < limit
        captions = [caption for caption, keep in zip(data.captions, kept, strict=True) if keep]
        images = normalize(self.features(data.index[:limit]), dim=-1)
        return images, self.model.text_features(captions), torch.from_numpy(data.image_of[kept])

    def classify(self, name: str, side: str, ks: Sequence[int] = metrics.CLASS_KS) -> tuple[Items, Tensor]:
        """Add the zero-shot accuracy on a labelled set, and return its items and labels."""
        one = self._icons.labelled[name]
        items = one.side(side).first(self._size.class_items)
        labels = torch.from_numpy(items.labels)
        classes = self.model.classifier(one.classes, one.templates)
        scores = normalize(self.features(items.index), dim=-1) @ classes
        self.add(f"zero-shot/{name}", len(labels), metrics.named_accuracy(scores, labels, ks))
        return items, labels


def measure(
    model: ClipModel, icons: Icons, size: SimpleNamespace, *, figures: bool, teacher: ClipModel | None = None
) -> dict[str, Any]:
    """Measure a model on the test side with everything, and how far it ranks as ``teacher`` does.

    Returns:
        ``metrics``, ``chance``, ``items``, and with ``figures`` what Figures 6 and 7 show of this model.
    """
    found = Measurement(model, icons, size)
    for name in ("test", *icons.shifts):
        block = found.retrieved(name if name == "test" else f"{name}/test")
        found.add(f"retrieval/{name}", len(block[0]), metrics.named_recall(*block))
        if name == "test":
            pairs = _first_pairs(*block)
    found.add("geometry/test", len(pairs[0]), {**geometry(*pairs), "logit_scale": model.logit_scale})
    if teacher is not None:
        theirs = Measurement(teacher, icons, size).retrieved("test", len(pairs[0]))
        found.add("teacher/test", len(pairs[0]), teacher_agreement(pairs, _first_pairs(*theirs)))
    for name, one in icons.labelled.items():
        items, labels = found.classify(name, "test")
        if not one.shift:
            train = one.train.first(size.probe_items)
            validation = one.validation.first(size.probe_items // 2)
            probed = probe.linear_probe(
                *((found.features(p.index), torch.from_numpy(p.labels)) for p in (train, validation)),
                found.features(items.index),
                classes=len(one.classes),
                strengths=size.probe_strengths,
            )
            found.add(f"probe/{name}", len(labels), metrics.named_accuracy(probed, labels))
    content = found.content()
    if figures:
        # The items are in random order.
        umap = umap_points(*(features[: size.umap_pairs] for features in pairs))
        content["figures"] = {"umap": umap, "heat_maps": heat_maps(model, icons)}
    return content


def _first_pairs(images: Tensor, texts: Tensor, image_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first pictures' features, and those of each one's first caption."""
    first = torch.tensor([True, *(image_of[1:] != image_of[:-1]).tolist()])
    return images[:_GEOMETRY_ITEMS], texts[first][:_GEOMETRY_ITEMS]


def geometry(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Return what :mod:`rankloss.metrics` says of unit-norm pairs, ``[N, D]`` each."""
    values = {
        "alignment": alignment(images, texts),
        "uniformity_image": uniformity(images),
        "uniformity_text": uniformity(texts),
        "uniformity_cross": uniformity(images, texts),
        "modality_gap": modality_gap(images, texts),
        **rank_agreement(images, texts, max_anchors=_GEOMETRY_ANCHORS),
    }
    return {name: value.item() for name, value in values.items()}


def teacher_agreement(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], anchors: int = _GEOMETRY_ANCHORS
) -> dict[str, float]:
    """Return how far a student ranks N pairs as its teacher does: Kendall's τ-b, the mean over lists.

    Each comes as the unit-norm features of images and of texts, ``[N, D]``, row i of both being a pair. The
    lists are those of so many evenly spaced ``anchors``, of the other modality and of their own.
    """
    rows = torch.linspace(0, len(student[0]) - 1, min(anchors, len(student[0]))).round().long()

    def tau(anchor: int, items: int) -> float:
        mine, theirs = (of[anchor][rows] @ of[items].T for of in (student, teacher))
        return float(kendall_tau(mine, theirs).nanmean())

    return {
        "cross_modal_tau": (tau(0, 1) + tau(1, 0)) / 2,
        "in_modal_tau": (tau(0, 0) + tau(1, 1)) / 2,
    }


def measure_side(model: ClipModel, icons: Icons, size: SimpleNamespace, side: str) -> dict[str, Any]:
    """Measure a model of the search on one side, and look at no held-out picture of another.

    Returns:
        ``metrics``, ``chance``, ``items``, and ``diverged``: whether the embeddings are not finite; then
        there are no scores.
    """
    found = Measurement(model, icons, size)
    images, texts, image_of = found.retrieved(side)
    diverged = not (torch.isfinite(images).all() and torch.isfinite(texts).all())
    if not diverged:
        found.add("retrieval", len(images), metrics.named_recall(images, texts, image_of))
        for name, one in icons.labelled.items():
            if not one.shift:
                found.classify(name, side, (1,))
    return {**found.content(), "diverged": diverged}


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


def fingerprint(model: ClipModel) -> str:
    """Name a model by its weights: the same arguments give other bits on another machine."""
    digest = hashlib.sha256()
    for value in model.model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def measured(
    setting: Setting | Attempt, model: ClipModel, icons: Icons, teacher: ClipModel | None
) -> dict[str, Any]:
    """Measure what a setting asks for; an attempt's record says whether the model diverged."""
    size = size_of(setting.preset)
    if isinstance(setting, Setting):
        # Figures 6 and 7 show one seed of every loss.
        shown = (setting.backbone, setting.pairs, setting.seed) == ("resnet", size.pairs, 0)
        shown = shown and {setting.lambda_cross, setting.lambda_in} <= {0.0, 1.0}
        return measure(model, icons, size, figures=shown)
    finite = all(bool(torch.isfinite(value).all()) for value in model.model.state_dict().values())
    if not (setting.whole and finite):
        return measure_side(model, icons, size, setting.side)
    found = measure(model, icons, size, figures=False, teacher=teacher)
    found["teacher"] = teacher and fingerprint(teacher)
    found["diverged"] = not math.isfinite(found["metrics"]["geometry/test"]["alignment"])
    return found
