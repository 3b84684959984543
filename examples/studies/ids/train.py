"""Pairs that belong together: the partners of a pair as any others, left out, or sharing its target.

The plan is ``plan.md`` beside this file. The command does the missing trainings, and writes ``report.md``
once all are there; nothing is tested before.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from examples_common.machine import conditions
from examples_common.optimization import parameter_groups
from examples_common.records import Record, Store
from examples_common.statistics import Difference, correct, estimate, paired_difference
from examples_common.terminal import say, status_of
from examples_common.trainings import Trainings, finder
from examples_common.wording import conditions_texts, marked, mean_text, p_text, write_report
from icons_data.load import load
from openmoji_demo.data import draw, held_out_caption, load_emojis, read_svg, split_by_concept, train_captions
from photostudy import heads
from photostudy.features import Cache, FrozenEncoders, Side, standardised
from photostudy.folder import read
from photostudy.heads import Heads
from photostudy.students.data import Thumbnails, numbered, vocabulary
from photostudy.students.model import Student
from photostudy.students.train import crops
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

import rankloss

HERE = Path(__file__).parent
SEEDS = tuple(range(7100, 7108))
SHARES = {"all": 1.0, "half": 0.5, "tenth": 0.1}  # of the pictures whose caption is their class
BATCHES = (250, 1000)  # of Flickr8k's rows
DRAWN = tuple(f"{name}, {share}" for name in ("emojis", "icons") for share in SHARES)
ROWS = tuple(f"rows, {batch}" for batch in BATCHES)
LOSSES = ("clip", "rankclip")
OWN, IGNORE, SHARE = "own", "ignore", "share"
USES = {**dict.fromkeys(DRAWN, (OWN, IGNORE)), **dict.fromkeys(ROWS, (OWN, IGNORE, SHARE))}
RECALL, ZERO_SHOT = "R@10", "zero-shot top-1"
MEASURES = {**dict.fromkeys(DRAWN, (RECALL, ZERO_SHOT)), **dict.fromkeys(ROWS, (RECALL,))}
ICONS = "mdi"  # the labelled set
_EPOCHS = {"emojis": 30, "icons": 15, "rows": 3}
_RATES = {"emojis": 2e-3, "icons": 1e-3, "rows": 1e-3}
_DECAY, _CEILING = 0.05, 100.0
_PACKAGES = {name: name for name in ("torch", "numpy", "rankloss")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    cell: str  # a name of DRAWN or ROWS
    arm: str  # a loss and a use of ids, such as "clip ignore"
    seed: int
    epochs: int
    lr: float
    batch_size: int
    side: str = "test"


def setting(cell: str, loss: str, use: str, seed: int) -> Setting:
    """Return the setting of a training."""
    kind, _, size = cell.partition(", ")
    batch = int(size) if cell in ROWS else 250
    return Setting(cell, f"{loss} {use}", seed, _EPOCHS[kind], _RATES[kind], batch)


def planned() -> list[Setting]:
    """Return all trainings, seed by seed."""
    return [
        setting(cell, loss, use, seed)
        for seed, cell, loss in itertools.product(SEEDS, USES, LOSSES)
        for use in USES[cell]
    ]


def build(arm: str) -> nn.Module:
    """Return an arm's loss."""
    loss, _, use = arm.partition(" ")
    base = rankloss.ClipLoss(same_id=None if use == OWN else use)
    return base if loss == "clip" else rankloss.RankClipLoss(base)


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
        return Heads(self.train, heads.Setting("clip", 0, "test"))

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


def emojis(share: float) -> Drawings:
    """Return emojis, so many of which have their sub-group as caption."""
    split = split_by_concept(load_emojis())
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


def icons(folder: Path, share: float) -> Drawings:
    """Return the icons of a labelled set, so many of which have their category as caption."""
    build = load(folder)
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
    """The cells' pairs, made when they are needed."""

    def __init__(self, photographs: Path, icons: Path) -> None:
        self.photographs, self.icons = read(photographs), icons
        self.names = self.photographs.used(6000)
        self.cache = Cache(self.photographs, FrozenEncoders.name)
        self._made: dict[str, Pairs] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all that the numbers depend on."""
        blocks = [path.stem for of in self.names.values() for path in self.cache.blocks(of)]
        found = hashlib.sha256("\n".join(blocks).encode())
        for cell in DRAWN:
            of = self[cell]
            assert isinstance(of, Drawings)
            for tensor in (of.pictures, of.sentences, of.test, of.texts, of.classes, of.labels):
                found.update(tensor.contiguous().numpy())
        return found.hexdigest()[:16]

    def __getitem__(self, cell: str) -> Pairs:
        kind, _, share = cell.partition(", ")
        key = kind if kind == "rows" else cell
        if key not in self._made:
            if kind == "rows":
                self._made[key] = Rows(
                    standardised({side: self.cache.side(of) for side, of in self.names.items()})
                )
            else:
                self._made[key] = (
                    emojis(SHARES[share]) if kind == "emojis" else icons(self.icons, SHARES[share])
                )
        return self._made[key]


# --- trainings ---


def train(setting: Setting, pairs: Pairs) -> tuple[Any, float]:
    """Train towers, and return them in evaluation mode and the share of pairs that had a partner.

    A seed gives every arm of a cell the same initial weights, batches, captions and crops.
    """
    torch.manual_seed(setting.seed)
    drawing = torch.Generator().manual_seed(setting.seed)
    model, loss = pairs.model().train(), build(setting.arm)
    groups = parameter_groups(list(model.parameters()), _DECAY)
    optimizer = torch.optim.AdamW(groups, lr=setting.lr, fused=True)
    each = len(pairs) // setting.batch_size
    steps = setting.epochs * each
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shares, step = [], 0
    for _ in range(setting.epochs):
        for rows in torch.randperm(len(pairs), generator=drawing).split(setting.batch_size)[:each]:
            step += 1
            if isinstance(loss, rankloss.RankClipLoss):
                loss.set_progress(step, steps)
            v, t, ids = pairs.batch(model, rows, drawing)
            shares.append(partnered(ids))
            known = {} if setting.arm.endswith(OWN) else {"pair_ids": ids}
            value = loss(v, t, model.log_scale.exp(), **known)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.log_scale.clamp_(0.0, math.log(_CEILING))
    return model.eval(), fmean(shares)


def partnered(ids: Tensor) -> float:
    """Return the share of pairs whose id another pair of the batch has, in percent.

    Example:
        >>> partnered(torch.tensor([3, 1, 3, 2]))
        50.0
    """
    _, places, counts = ids.unique(return_inverse=True, return_counts=True)
    return 100 * (counts[places] > 1).double().mean().item()


@dataclasses.dataclass(frozen=True)
class Study(Trainings):
    """The trainings and their records."""

    cells: Data
    store: Store
    locks: Path

    @property
    def data(self) -> str:
        """Fingerprint of the data."""
        return self.cells.fingerprint

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record."""
        pairs, began = self.cells[setting.cell], time.process_time()
        model, share = train(setting, pairs)
        with torch.inference_mode():
            metrics = pairs.measure(model)
        return {
            "setting": dataclasses.asdict(setting),
            "metrics": {name: round(value, 4) for name, value in metrics.items()},
            "partnered": round(share, 3),
            "chance": {},
            "items": {"train": len(pairs)},
            "data": self.data,
            "processor_seconds": round(time.process_time() - began, 1),
            "conditions": conditions(_PACKAGES, threads=torch.get_num_threads()),
        }


# --- tests ---

Key = tuple[str, str, str, str]  # cell, loss, use minus OWN, measure


def tests(records: Mapping[Setting, Record]) -> dict[Key, Difference]:
    """Return the planned differences to OWN, paired by seed, corrected by Holm over all of them."""
    found = {}
    for cell, loss in itertools.product(USES, LOSSES):
        for use, measure in itertools.product(USES[cell][1:], MEASURES[cell]):
            of = (
                {seed: records[setting(cell, loss, one, seed)]["metrics"][measure] for seed in SEEDS}
                for one in (use, OWN)
            )
            found[cell, loss, use, measure] = paired_difference(*of)
    return correct(found)


def write(records: Mapping[Setting, Record]) -> Path:
    """Write the report of all records.

    Raises:
        RuntimeError: If a training is missing.
    """
    if missing := sum(one not in records for one in planned()):
        raise RuntimeError(f"{missing} of {len(planned())} trainings are missing: nothing is reported yet")
    found = tests(records)
    shares = {
        cell: fmean(records[setting(cell, LOSSES[0], OWN, seed)]["partnered"] for seed in SEEDS)
        for cell in USES
    }
    rows = []
    for (cell, loss, use, measure), d in sorted(found.items(), key=lambda of: -shares[of[0][0]]):
        own = [records[setting(cell, loss, OWN, seed)]["metrics"][measure] for seed in SEEDS]
        rows.append(
            [cell, f"{shares[cell]:.1f} %", f"`{loss}`", measure, mean_text(estimate(own), len(SEEDS)), use,
             marked(d), p_text(d.adjusted)]
        )  # fmt: skip
    return write_report(
        HERE / "report.md",
        HERE / "template.md",
        tests=len(found),
        rows=rows,
        matters=[list(of) for of in matters(found, shares)],
        made=conditions_texts(records.values()),
    )


def matters(found: Mapping[Key, Difference], shares: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return for each kind of data and measure the smallest share from which leaving out is above OWN.

    It is above at that share and at every larger one of the kind, with CLIP's loss, after the correction.
    """
    rows = []
    for kind, measure in (("emojis", RECALL), ("emojis", ZERO_SHOT), ("icons", RECALL), ("icons", ZERO_SHOT),
                          ("rows", RECALL)):  # fmt: skip
        cells = sorted((cell for cell in shares if cell.startswith(kind)), key=lambda cell: -shares[cell])
        above = [found[cell, LOSSES[0], IGNORE, measure] for cell in cells]
        n = next((i for i, d in enumerate(above) if not (d.established and d.mean > 0)), len(cells))
        text = "at none" if n == 0 else f"from {shares[cells[n - 1]]:.1f} % on"
        rows.append((kind, measure, text))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing trainings, and write the report once all are there."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="the folder of Flickr8k, with its features")
    parser.add_argument("--icons", type=Path, default=Path("outputs/icons"), help="folder of the icons")
    parser.add_argument("--output", type=Path, default=Path("outputs/ids"), help="folder of the locks")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if not args.report_only and args.data is None:
        parser.error("argument --data: needed")

    def run(console: Console) -> int:
        store = Store(HERE)
        if not args.report_only:
            torch.set_num_threads(1)  # sums keep one order
            study = Study(Data(args.data, args.icons), store, args.output / "locks")
            study.do("Trainings", planned(), console)
        say(console, str(write(finder(store, Setting)(planned()))))
        return 0

    return status_of(run)


if __name__ == "__main__":
    sys.exit(main())
