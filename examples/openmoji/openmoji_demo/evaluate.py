"""Held-out retrieval and zero-shot classification of one trained model or of the pixel baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from clip_evaluation import metrics, model, pixel_knn
from PIL import Image
from torch.nn.functional import normalize

from . import data

STYLES = ("color", "line")
TASKS = ("image_to_text", "text_to_image", "subgroup", "group")
Scores = dict[str, dict[int, float]]


@dataclasses.dataclass(frozen=True)
class TestSet:
    """The held-out concepts, drawn in one style; one caption and one class of each level per picture."""

    images: list[Image.Image]
    captions: list[str]
    subgroups: list[str]
    groups: list[str]
    subgroup_classes: list[str]  # to choose from
    group_classes: list[str]

    def classes(self, level: str) -> list[str]:
        """Return the classes of ``"subgroup"`` or ``"group"``, in the order of the score columns."""
        return self.subgroup_classes if level == "subgroup" else self.group_classes

    def labels(self, level: str) -> torch.Tensor:
        """Return the right column of every picture."""
        names = self.subgroups if level == "subgroup" else self.groups
        return torch.tensor([self.classes(level).index(name) for name in names])


def load_test_set(root: Path, folder: Path, style: str) -> TestSet:
    """Read the held-out pictures of a build, in colour or as line art.

    Line drawings that look exactly like another emoji's are left out: their caption cannot be found by
    any method. The classes are the same for both styles.
    """
    every = data.read_table(folder / "test.csv")
    rows = every if style == "color" else [row for row in every if row["line_is_unique"] == "1"]
    column = "filepath" if style == "color" else "line_filepath"
    return TestSet(
        images=_open_all(root, [row[column] for row in rows]),
        captions=[row["title"] for row in rows],
        subgroups=[row["subgroup"] for row in rows],
        groups=[row["group"] for row in rows],
        subgroup_classes=sorted({row["subgroup"] for row in every}),
        group_classes=sorted({row["group"] for row in every}),
    )


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One picture with one caption per concept."""

    names: list[str]
    images: list[Image.Image]
    captions: list[str]


def load_pairs(root: Path, table: Path) -> Pairs:
    """Read the first picture of every concept in a table of a build."""
    first = {row["concept"]: row for row in reversed(data.read_table(table))}
    rows = list(first.values())[::-1]
    images = _open_all(root, [row["filepath"] for row in rows])
    return Pairs([row["name"] for row in rows], images, [row["title"] for row in rows])


def load_pixel_knn(root: Path, folder: Path) -> PixelKNN:
    """Index the training pictures of a build for the untrained baseline."""
    rows = data.read_table(folder / "train_emojis.csv")
    return PixelKNN(
        _open_all(root, [row["filepath"] for row in rows]),
        [row["title"] for row in rows],
        [row["subgroup"] for row in rows],
        [row["group"] for row in rows],
    )


def _open_all(root: Path, paths: Sequence[str]) -> list[Image.Image]:
    images = []
    for path in paths:
        with Image.open(root / path) as image:
            images.append(image.convert("RGB"))
    return images


class ClipModel:
    """A checkpoint of the trainer, loaded through open_clip.

    Args:
        model_dir: The ``local-dir`` with the architecture.
        checkpoint: The trainer's ``epoch_N.pt``.
        device: Where to run it.
    """

    def __init__(self, model_dir: Path, checkpoint: Path, device: str) -> None:
        self._model = model.ClipModel(f"local-dir:{model_dir}", checkpoint=checkpoint, device=device)

    def _image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        features, _ = self._model.image_features([(self._model.preprocess(image), None) for image in images])
        return normalize(features, dim=-1)

    def features(
        self, images: Sequence[Image.Image], captions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unit-norm features of the pictures and of the captions."""
        return self._image_features(images), self._model.text_features(captions)

    def caption_scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """Return the cosine of every picture with every caption."""
        image_features, text_features = self.features(images, captions)
        return image_features @ text_features.T

    def class_scores(
        self,
        images: Sequence[Image.Image],
        level: str,  # noqa: ARG002 (the class names say it)
        classes: Sequence[str],
    ) -> torch.Tensor:
        """Return the cosine of every picture with every class."""
        return self._image_features(images) @ self._model.classifier(classes, data.TEMPLATES)


class PixelKNN:
    """The baseline that learns nothing; see :mod:`clip_evaluation.pixel_knn`.

    Args:
        images: The training pictures, all of one size.
        captions: One caption for each of them: name and keywords.
        subgroups: The sub-group of each of them.
        groups: The group of each of them.
        k: How many neighbours vote.
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        subgroups: Sequence[str],
        groups: Sequence[str],
        k: int = pixel_knn.NEIGHBOURS,
    ) -> None:
        self._images, self._captions, self._k = _pixels(images), captions, k
        self._labels = {"subgroup": subgroups, "group": groups}

    def caption_scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """Return how well each caption fits each picture: TF-IDF cosine with its neighbours' captions."""
        _, neighbours = pixel_knn.nearest(self._images, _pixels(images), self._k)
        return pixel_knn.caption_scores(neighbours, self._captions, captions)

    def class_scores(self, images: Sequence[Image.Image], level: str, classes: Sequence[str]) -> torch.Tensor:
        """Return the neighbours' votes for each class of a level; ties go to the nearest picture's class."""
        return pixel_knn.class_scores(self._images, self._labels[level], _pixels(images), classes, k=self._k)


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def score(method: ClipModel | PixelKNN, test_set: TestSet) -> tuple[Scores, torch.Tensor]:
    """Return a method's score at each task and cut-off, and the picture × caption matrix they came from."""
    similarity = method.caption_scores(test_set.images, test_set.captions)
    scores: Scores = {
        "image_to_text": metrics.recall_at_k(similarity),
        "text_to_image": metrics.recall_at_k(similarity.T),
    }
    for level in ("subgroup", "group"):
        columns = method.class_scores(test_set.images, level, test_set.classes(level))
        scores[level] = metrics.accuracy_at_k(columns, test_set.labels(level))
    return scores, similarity


def chance_scores(test_set: TestSet) -> Scores:
    """Return what guessing scores at each task."""
    n = len(test_set.images)
    return {
        "image_to_text": metrics.chance(n, metrics.RETRIEVAL_KS),
        "text_to_image": metrics.chance(n, metrics.RETRIEVAL_KS),
        "subgroup": metrics.chance(len(test_set.subgroup_classes), metrics.CLASS_KS),
        "group": metrics.chance(len(test_set.group_classes), metrics.CLASS_KS),
    }
