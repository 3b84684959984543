"""Held-out retrieval and zero-shot classification of one trained model or of the pixel baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from clip_evaluation import metrics, model, pixel_knn
from PIL import Image
from torch.nn.functional import normalize

from . import data

STYLES = ("color", "line")
LEVELS = ("subgroup", "group")
TASKS = ("image_to_text", "text_to_image", *LEVELS)
Scores = dict[str, dict[int, float]]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures of a build, and its table's row of each: ``title``, ``name``, ``concept`` and the levels."""

    images: list[Image.Image]
    rows: pd.DataFrame

    @property
    def captions(self) -> list[str]:
        """The one caption of each picture."""
        return self.rows["title"].tolist()


@dataclasses.dataclass(frozen=True)
class TestSet(Pictures):
    """The held-out concepts, drawn in one style; one caption and one class of each level per picture."""

    classes: dict[str, list[str]]  # to choose from, by level, in the order of the score columns

    def labels(self, level: str) -> torch.Tensor:
        """Return the right column of every picture."""
        return torch.tensor([self.classes[level].index(name) for name in self.rows[level]])


def load_test_set(root: Path, folder: Path, style: str) -> TestSet:
    """Read the held-out pictures of a build, in colour or as line art.

    Line drawings that look exactly like another emoji's are left out: their caption cannot be found by
    any method. The classes are the same for both styles.
    """
    every = data.read_table(folder / "test.csv")
    rows = every if style == "color" else every[every["line_is_unique"] == "1"]
    images = open_all(root, rows["filepath" if style == "color" else "line_filepath"])
    return TestSet(images, rows, {level: sorted(every[level].unique()) for level in LEVELS})


def load_pictures(root: Path, table: Path, *, once: bool = False) -> Pictures:
    """Read the pictures of a table of a build; with ``once`` only the first one of every concept."""
    rows = data.read_table(table)
    rows = rows.drop_duplicates("concept") if once else rows
    return Pictures(open_all(root, rows["filepath"]), rows)


def open_all(root: Path, paths: Iterable[str]) -> list[Image.Image]:
    """Read pictures."""
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

    def features(self, shown: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unit-norm features of the pictures and of the captions."""
        return self._image_features(shown.images), self._model.text_features(shown.captions)

    def caption_scores(self, shown: TestSet) -> torch.Tensor:
        """Return the cosine of every picture with every caption."""
        image_features, text_features = self.features(shown)
        return image_features @ text_features.T

    def class_scores(self, shown: TestSet, level: str) -> torch.Tensor:
        """Return the cosine of every picture with every class of a level."""
        return self._image_features(shown.images) @ self._model.classifier(
            shown.classes[level], data.TEMPLATES
        )


class PixelKNN:
    """The baseline that learns nothing; see :mod:`clip_evaluation.pixel_knn`.

    Args:
        training: The training pictures, all of one size.
        k: How many neighbours vote.
    """

    def __init__(self, training: Pictures, k: int = pixel_knn.NEIGHBOURS) -> None:
        self._pixels, self._training, self._k = _pixels(training), training, k

    def caption_scores(self, shown: TestSet) -> torch.Tensor:
        """Return how well each caption fits each picture: TF-IDF cosine with its neighbours' captions."""
        _, neighbours = pixel_knn.nearest(self._pixels, _pixels(shown), self._k)
        return pixel_knn.caption_scores(neighbours, self._training.captions, shown.captions)

    def class_scores(self, shown: TestSet, level: str) -> torch.Tensor:
        """Return the neighbours' votes for each class of a level; ties go to the nearest picture's class."""
        labels, classes = self._training.rows[level].tolist(), shown.classes[level]
        return pixel_knn.class_scores(self._pixels, labels, _pixels(shown), classes, k=self._k)


def _pixels(pictures: Pictures) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pictures.images])


def score(method: ClipModel | PixelKNN, test_set: TestSet) -> tuple[Scores, torch.Tensor]:
    """Return a method's score at each task and cut-off, and the picture × caption matrix they came from."""
    similarity = method.caption_scores(test_set)
    scores: Scores = {
        "image_to_text": metrics.recall_at_k(similarity),
        "text_to_image": metrics.recall_at_k(similarity.T),
    }
    for level in LEVELS:
        columns = method.class_scores(test_set, level)
        scores[level] = metrics.accuracy_at_k(columns, test_set.labels(level))
    return scores, similarity


def chance_scores(test_set: TestSet) -> Scores:
    """Return what guessing scores at each task."""
    recall = metrics.chance(len(test_set.images), metrics.RETRIEVAL_KS)
    levels = {k: metrics.chance(len(v), metrics.CLASS_KS) for k, v in test_set.classes.items()}
    return {"image_to_text": recall, "text_to_image": recall, **levels}
