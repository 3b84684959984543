"""Pairs that belong together: their data, and the trainings of towers on them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any, Protocol

import torch
from openmoji_demo.data import (
    draw,
    held_out_caption,
    load_emojis,
    read_svg,
    split_by_concept,
    train_captions,
)
from PIL import Image
from torch import Tensor, nn

import rankloss
from studies.icons.load import Icons
from studies.photographs import heads
from studies.photographs.data import Thumbnails, numbered, vocabulary
from studies.photographs.features import Cache, Side, standardised
from studies.photographs.heads import Heads
from studies.photographs.model import Student
from studies.photographs.train import crops
from studies.records import Record
from studies.training import Descent

CLIP, RANKCLIP = "clip", "rankclip"
OWN, IGNORE, SHARE = "own", "ignore", "share"
RECALL, ZERO_SHOT = "R@10", "zero-shot top-1"
ROWS = "rows"  # of Flickr8k
ICONS = "mdi"  # the labelled set
_DECAY = 0.05


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    cell: str  # a kind of data, and the share of classes or the size of a batch
    arm: str  # a loss and a use of ids, such as "clip ignore"
    seed: int
    epochs: int
    lr: float
    batch_size: int
    side: str = "test"


def build(arm: str) -> nn.Module:
    """Return an arm's loss."""
    loss, _, use = arm.partition(" ")
    base = rankloss.ClipLoss(same_id=None if use == OWN else use)
    return base if loss == CLIP else rankloss.RankClipLoss(base)


# --- data ---


class Model(Protocol):
    """Two towers with unit-norm features, and the scale of their similarities."""

    log_scale: Tensor

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return features, ``[N, D]``."""

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return features, ``[…, D]``."""


class Pairs(Protocol):
    """Pairs to train on, and the measures of other pictures."""

    def __len__(self) -> int:
        """Return the number of the pairs."""

    def model(self) -> Any:
        """Return new towers."""

    def batch(self, model: Any, rows: Tensor, drawing: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of pictures and sentences, and the pairs' ids."""

    def measure(self, model: Any) -> dict[str, float]:
        """Return the measures, in percent."""


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Pictures with several captions each."""

    pictures: Tensor  # uint8 [N, 64, 64, 3]
    captions: Sequence[Sequence[str]]


class Drawings:
    """Drawings, some of which have their class as caption; a pair's id is its caption.

    Args:
        train: To train on.
        test: Of other concepts, with a caption each.
        classes: Names of the classes.
        labels: Of the test.
    """

    def __init__(
        self, train: Captioned, test: Captioned, classes: Sequence[str], labels: Sequence[int]
    ) -> None:
        self.pictures, self.test, self.labels = train.pictures, test.pictures, torch.tensor(labels)
        words = vocabulary(caption for of in train.captions for caption in of)
        self.words = 2 + len(words)
        self.sentences = numbered(train.captions, words)
        number = {text: i for i, text in enumerate(sorted({text for of in train.captions for text in of}))}
        self.ids = torch.tensor([[number[text] for text in of] for of in train.captions])
        texts = [of[0] for of in test.captions]
        distinct = sorted(set(texts))
        self.right = torch.tensor([[text == other for other in distinct] for text in texts])
        self.texts = numbered([[text] for text in distinct], words)
        self.classes = numbered([[text] for text in classes], words)

    def __len__(self) -> int:
        return len(self.pictures)

    def model(self) -> Student:
        """Return a student from scratch."""
        return Student(self.words)

    def batch(self, model: Student, rows: Tensor, drawing: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of crops and of one caption each, and the captions' numbers."""
        drawn = torch.randint(self.ids.shape[1], rows.shape, generator=drawing)
        v = model.pictures(crops(self.pictures[rows], drawing))
        return v, model.sentences(self.sentences[rows, drawn]), self.ids[rows, drawn]

    def measure(self, model: Student) -> dict[str, float]:
        """Return R@10 among the test's captions, and top-1 among the classes."""
        v = model.pictures(self.test)
        texts, classes = (model.sentences(of)[:, 0] for of in (self.texts, self.classes))
        found = (v @ classes.T).argmax(1) == self.labels
        return {RECALL: recall(v @ texts.T, self.right), ZERO_SHOT: 100 * found.double().mean().item()}


class Rows:
    """Photographs, whose sentences are a row each; a pair's id is its picture."""

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self.train, self.test = sides["train"], sides["test"]

    def __len__(self) -> int:
        return self.train.sentences.shape[:2].numel()

    def model(self) -> Heads:
        """Return heads for frozen features."""
        return Heads(self.train, heads.Setting(CLIP, 0, "test"))

    def batch(self, model: Heads, rows: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of pictures and of their sentences, and the pictures' numbers."""
        picture, sentence = rows // self.train.sentences.shape[1], rows % self.train.sentences.shape[1]
        v = model.pictures(self.train.pictures[picture])
        return v, model.sentences(self.train.sentences[picture, sentence]), picture

    def measure(self, model: Heads) -> dict[str, float]:
        """Return R@10 among the test's sentences."""
        v, t = model.pictures(self.test.pictures), model.sentences(self.test.sentences)
        right = torch.eye(len(v), dtype=torch.bool).repeat_interleave(t.shape[1], 1)
        return {RECALL: recall(v @ t.flatten(0, 1).T, right)}


def recall(similarity: Tensor, right: Tensor, k: int = 10) -> float:
    """Return R@k in percent, the mean of both directions: a query counts if any right answer is among k.

    Example:
        >>> recall(torch.tensor([[0.9, 0.1], [0.8, 0.5]]), torch.eye(2, dtype=torch.bool), k=1)
        75.0
    """
    shares = []
    for scores, of in ((similarity, right), (similarity.T, right.T)):
        best = scores.masked_fill(~of, -math.inf).amax(1, keepdim=True)
        shares.append(((scores > best).sum(1) < k).double().mean().item())
    return 100 * fmean(shares)


def of_class(keys: Sequence[str], share: float) -> set[str]:
    """Return the pictures whose caption is their class: a part of those of a larger share."""
    shuffled = random.Random("classes").sample(sorted(keys), len(keys))
    return set(shuffled[: round(share * len(keys))])


def emojis(share: float, limit: int | None = None) -> Drawings:
    """Return emojis, so many of which have their sub-group as caption."""
    split = split_by_concept(load_emojis()[:limit])
    train, test = split_by_concept(split.train, 1).train, split.test
    chosen = of_class([one.hexcode for one in (*train, *test)], share)
    classes = sorted({one.subgroup for one in train})

    def side(of: Sequence[Any], own: Any) -> Captioned:
        pictures = Thumbnails().pictures([draw(read_svg(one.hexcode)) for one in of])
        captions = [own(one) for one in of]
        width = len(captions[0])
        said = [
            [one.subgroup] * width if one.hexcode in chosen else texts
            for one, texts in zip(of, captions, strict=True)
        ]
        return Captioned(torch.from_numpy(pictures), said)

    sides = side(train, train_captions), side(test, lambda one: [held_out_caption(one)])
    return Drawings(*sides, classes, [classes.index(one.subgroup) for one in test])


def icons(build: Icons, share: float) -> Drawings:
    """Return the icons of a labelled set, so many of which have their category as caption."""
    labelled = build.labelled[ICONS]
    sides = {"train": labelled.train, "test": labelled.test}
    keys = [build.records[i].name for of in sides.values() for i in of.index]
    chosen = of_class(keys, share)

    def side(name: str) -> Captioned:
        of, records = sides[name], [build.records[i] for i in sides[name].index]
        pictures = Thumbnails().pictures([Image.fromarray(image) for image in of.images])
        said = [
            [labelled.classes[label] if one.name in chosen else one.text if name == "train" else one.caption]
            for one, label in zip(records, of.labels, strict=True)
        ]
        return Captioned(torch.from_numpy(pictures), said)

    return Drawings(side("train"), side("test"), labelled.classes, sides["test"].labels.tolist())


class Data:
    """The cells' pairs, made when they are needed, and the trainings on them.

    Args:
        cells: Their names.
        shares: Of pictures whose caption is their class, by name.
        cache: The photographs with their features; None without cells of rows.
        train_pictures: Photographs to train on.
        icons: A function that returns them.
        limit: The first so many emojis; None: all.
    """

    def __init__(
        self, cells: Sequence[str], shares: Mapping[str, float], cache: Cache | None, train_pictures: int,
        icons: Callable[[], Icons], limit: int | None,
    ) -> None:  # fmt: skip
        self.cells, self.shares, self.cache, self.icons, self.limit = cells, shares, cache, icons, limit
        self.names = {} if cache is None else cache.photographs.used(train_pictures)
        self._made: dict[str, Pairs] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all that the numbers depend on."""
        blocks = [path.stem for of in self.names.values() for path in self.cache.blocks(of)]
        found = hashlib.sha256("\n".join(blocks).encode())
        for cell in self.cells:
            if not cell.startswith(ROWS):
                of = self[cell]
                assert isinstance(of, Drawings)
                for tensor in (of.pictures, of.sentences, of.test, of.texts, of.classes, of.labels):
                    found.update(tensor.contiguous().numpy())
        return found.hexdigest()[:16]

    def __getitem__(self, cell: str) -> Pairs:
        kind, _, share = cell.partition(", ")
        key = kind if kind == ROWS else cell
        if key not in self._made:
            self._made[key] = self._make(kind, self.shares.get(share, 0.0))
        return self._made[key]

    def _make(self, kind: str, share: float) -> Pairs:
        if kind == "emojis":
            return emojis(share, self.limit)
        if kind == "icons":
            return icons(self.icons(), share)
        return Rows(standardised({side: self.cache.side(of) for side, of in self.names.items()}))

    def train(self, setting: Setting) -> Record:
        """Train and measure a setting."""
        pairs, began = self[setting.cell], time.process_time()
        model, share = train(setting, pairs)
        with torch.inference_mode():
            metrics = pairs.measure(model)
        return {
            "metrics": {name: round(value, 4) for name, value in metrics.items()},
            "partnered": round(share, 3),
            "items": {"train": len(pairs)},
            "processor_seconds": round(time.process_time() - began, 1),
        }


# --- trainings ---


def train(setting: Setting, pairs: Pairs) -> tuple[Any, float]:
    """Train towers, and return them in evaluation mode and the share of pairs that had a partner.

    A seed gives every arm of a cell the same initial weights, batches, captions and crops.
    """
    torch.manual_seed(setting.seed)
    drawing = torch.Generator().manual_seed(setting.seed)
    model, loss = pairs.model().train(), build(setting.arm)
    each = len(pairs) // setting.batch_size
    steps = setting.epochs * each
    descent = Descent(model.log_scale, [model], lr=setting.lr, weight_decay=_DECAY, steps=steps)
    shares, step = [], 0
    for _ in range(setting.epochs):
        for rows in torch.randperm(len(pairs), generator=drawing).split(setting.batch_size)[:each]:
            step += 1
            if isinstance(loss, rankloss.RankClipLoss):
                loss.set_progress(step, steps)
            v, t, ids = pairs.batch(model, rows, drawing)
            shares.append(partnered(ids))
            known = {} if setting.arm.endswith(OWN) else {"pair_ids": ids}
            descent.step(loss(v, t, model.log_scale.exp(), **known))
    return model.eval(), fmean(shares)


def partnered(ids: Tensor) -> float:
    """Return the share of pairs whose id another pair of the batch has, in percent.

    Example:
        >>> partnered(torch.tensor([3, 1, 3, 2]))
        50.0
    """
    _, places, counts = ids.unique(return_inverse=True, return_counts=True)
    return 100 * (counts[places] > 1).double().mean().item()
