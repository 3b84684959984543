"""Retrieval and classification of held-out emojis, and how far a picture and its caption rank alike."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.datasets.folder import default_loader

from rankloss.metrics import kendall_tau, partner_ranks, rank_agreement

from . import data, metrics, model, pixel_knn

STYLES = ("color", "line")
LEVELS = ("subgroup", "group")
TASKS = ("image_to_text", "text_to_image", *LEVELS)
TRAINING, HELD_OUT = "training", "held-out"
SHOWN = "food and drink"  # the group of the concept whose rankings are drawn: no gesture, no flag
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

    def labels(self, level: str) -> Tensor:
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
    return [default_loader(str(root / path)) for path in paths]


@dataclasses.dataclass(frozen=True)
class Answers:
    """A method's answers to the pictures of a test set.

    ``similarity`` is that of every picture with every caption, ``classes`` has the score of every class of
    each level, and ``ranks`` those of the own caption and of the own picture; None for votes, which tie.
    """

    similarity: Tensor
    classes: dict[str, Tensor]
    ranks: dict[str, Tensor] | None = None

    def recall(self) -> metrics.Recall:
        """Return R@k both ways."""
        if self.ranks is None:
            return metrics.recall(self.similarity)
        recalls: metrics.Recall = {}
        for way, ranks in self.ranks.items():
            recalls[way] = {k: 100 * (ranks <= k).double().mean().item() for k in metrics.RETRIEVAL_KS}
        return recalls


class ClipModel(model.ClipModel):
    """A trained model."""

    def features(self, shown: Pictures) -> tuple[Tensor, Tensor]:
        """Return the unit-norm features of the pictures and of the captions."""
        features = self.image_features([self.preprocess(image) for image in shown.images])
        return normalize(features, dim=-1), self.text_features(shown.captions)

    def answers(self, shown: TestSet) -> Answers:
        """Return the cosine of every picture with every caption, and with every class of each level."""
        images, texts = self.features(shown)
        prompts = {level: self.classifier(names, data.TEMPLATES) for level, names in shown.classes.items()}
        classes = {level: images @ of_level for level, of_level in prompts.items()}
        return Answers(images @ texts.T, classes, partner_ranks(images, texts))


Method = Callable[[TestSet], Answers]


def knn_answers(training: Pictures, shown: TestSet) -> Answers:
    """Return the answers of the baseline that learns nothing: see :mod:`openmoji_demo.pixel_knn`."""
    seen, queries = _pixels(training), _pixels(shown)
    _, neighbours = pixel_knn.nearest(seen, queries)
    similarity = pixel_knn.caption_scores(neighbours, training.captions, shown.captions)
    votes = {
        level: pixel_knn.class_scores(seen, training.rows[level], queries, names)
        for level, names in shown.classes.items()
    }
    return Answers(similarity, votes)


def _pixels(pictures: Pictures) -> np.ndarray:
    """Return the pixels of pictures, ``[N, height, width, 3]``."""
    return np.stack([np.asarray(image) for image in pictures.images])


def score(answers: Answers, test_set: TestSet) -> Scores:
    """Return a method's score at each task and cut-off."""
    accuracies = {
        level: metrics.accuracy_at_k(scores, test_set.labels(level))
        for level, scores in answers.classes.items()
    }
    return {**answers.recall(), **accuracies}


@dataclasses.dataclass(frozen=True)
class Found:
    """The share of the held-out concepts that a model finds, against that of the first model."""

    percent: float  # R@10, mean of both ways
    minus_first: float | None = None  # in points; None for the first model itself
    half_width: float | None = None  # half of the difference's 95 % interval over the concepts

    @property
    def is_noise(self) -> bool:
        """True if the interval of the difference has 0, or there is no difference."""
        return self.minus_first is None or self.half_width is None or abs(self.minus_first) <= self.half_width


def compare(ranks: Mapping[str, Mapping[str, Tensor]], k: int = 10) -> dict[str, Found]:
    """Compare every model with the first by R@k, paired by concept.

    ``ranks`` has the ranks of right answers by model and way, as ``Answers.ranks``.
    """
    hits = {}  # of each concept in percent, the mean of both ways
    for name, ranks_of_ways in ranks.items():
        is_found = torch.stack([ranks_of_way <= k for ranks_of_way in ranks_of_ways.values()])
        hits[name] = 100 * is_found.double().mean(dim=0)
    first, *others = hits
    found = {first: Found(hits[first].mean().item())}
    for name in others:
        differences = hits[name] - hits[first]
        standard_error = differences.std().item() / len(differences) ** 0.5
        half_width = 1.96 * standard_error
        found[name] = Found(hits[name].mean().item(), differences.mean().item(), half_width)
    return found


def chance_scores(test_set: TestSet) -> Scores:
    """Return what guessing scores at each task."""
    recall = metrics.chance(len(test_set.images), metrics.RETRIEVAL_KS)
    accuracies = {
        level: metrics.chance(len(names), metrics.CLASS_KS) for level, names in test_set.classes.items()
    }
    return {"image_to_text": recall, "text_to_image": recall, **accuracies}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Kendall's τ of every model, and the rankings of the food or drink with τ nearest to the averages."""

    averages: Mapping[str, Mapping[str, float]]  # by model, on the training and on the held-out concepts
    concepts: Mapping[str, int]  # how many
    anchor: int
    labels: Sequence[str]  # names of the training concepts
    scores: Mapping[str, tuple[Tensor, Tensor]]  # by model: those of the picture, and of its caption

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        scores = {
            name: torch.stack(both).double().numpy().round(5).tolist() for name, both in self.scores.items()
        }
        text = json.dumps({**vars(self), "scores": scores}, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def measure_agreement(models: Mapping[str, ClipModel], training: Pictures, held_out: Pictures) -> Agreement:
    """Compare the rankings of all pictures with those of their captions, under every model.

    Without a concept in the group SHOWN the rankings of the first concept are those to draw.
    """
    averages: dict[str, dict[str, float]] = {}
    lists: dict[str, tuple[Tensor, Tensor]] = {}
    distance = torch.zeros(len(training.images), dtype=torch.float64)  # of each concept's τ from the averages
    for name, clip in models.items():
        v, t = clip.features(training)
        averages[name] = {
            TRAINING: rank_agreement(v, t)["cross_modal_tau"].item(),
            HELD_OUT: rank_agreement(*clip.features(held_out))["cross_modal_tau"].item(),
        }
        lists[name] = (v @ t.T, t @ v.T)
        distance += (kendall_tau(*lists[name]) - averages[name][TRAINING]).square()
    is_shown = torch.tensor([group == SHOWN for group in training.rows["group"]])
    anchor = int(distance.nan_to_num(torch.inf).masked_fill(~is_shown, torch.inf).argmin())
    return Agreement(
        averages=averages,
        concepts={TRAINING: len(training.images), HELD_OUT: len(held_out.images)},
        anchor=anchor,
        labels=training.rows["name"].tolist(),
        scores={name: (first[anchor], second[anchor]) for name, (first, second) in lists.items()},
    )
