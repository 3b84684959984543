"""The captions' data sets and one more vendor's drawings; measures of a student beside retrieval."""

from __future__ import annotations

import argparse
import functools
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from openmoji_demo.drawing import rasterise
from PIL import Image
from torch import Tensor

from rankloss.metrics import alignment, uniformity
from studies import icons
from studies.captions.data import SIDES, DataSet, Source, Splits, sources
from studies.captions.student import Student
from studies.data import drawings
from studies.icons import draw, labels, package
from studies.icons.split import VALIDATION
from studies.records import Record
from studies.students.measure import recorded

from .train import Setting, train

VENDOR = "vendor"
SECOND = "second"  # the side of more held-out concepts
_TEST = 0.25  # of the vendor's concepts


class Measured(DataSet):
    """A data set, trainings of the study's arms on it, and all measures.

    Classes are names that items share, by side; of texts without any those of one picture are a class.
    """

    def train(self, setting: Setting) -> Record:
        """Train and measure a student."""
        return recorded(
            lambda: train(setting, self.sides["train"], self.teachers, self.words),
            lambda model: self.measure(model, setting.side),
        )

    @torch.inference_mode()
    def measure(self, model: Student, side: str) -> dict[str, dict[str, Any]]:
        """Return the metrics of a model on a side; with the test side also those of the second."""
        found: dict[str, dict[str, Any]] = super().measure(model, side)
        v, t = model.pictures(self.sides[side].pictures), model.sentences(self.sides[side].sentences)
        found["geometry"] |= {
            "alignment": alignment(v, t[:, 0]).item(),
            "pictures' uniformity": uniformity(v).item(),
            "texts' uniformity": uniformity(t[:, 0]).item(),
        }
        found["within"] = self._within(side, v, t)
        if side == "test" and SECOND in self.sides:
            found[SECOND] = super().measure(model, SECOND)
        return found

    def _within(self, side: str, v: Tensor, t: Tensor) -> dict[str, float]:
        classes = self.source.categories.get(side) or [[one] for one in self.source.classes.get(side, ())]
        if classes:
            same, of = sharing(classes), {"pictures": v, "texts": t[:, 0]}
            return {f"{name} R@{k}": of_class(x, same, k) for name, x in of.items() for k in (1, 10)}
        if t.shape[1] == 1:
            return {}
        picture = torch.arange(len(t)).repeat_interleave(t.shape[1])
        same = picture == picture.unsqueeze(1)
        return {f"texts R@{k}": of_class(t.flatten(0, 1), same, k) for k in (1, 10)}


def sharing(classes: Sequence[Sequence[str]]) -> Tensor:
    """Return whether two items share a class, bool ``[N, N]``.

    Example:
        >>> sharing([["a", "b"], [], ["b"]]).tolist()
        [[True, False, True], [False, False, False], [True, False, True]]
    """
    names = sorted({name for of in classes for name in of})
    member = torch.tensor([[name in of for name in names] for of in classes], dtype=torch.float32)
    return member @ member.T > 0


def of_class(x: Tensor, same: Tensor, k: int) -> float:
    """Return the percentage of items with another of their class among the k nearest, if there is another.

    Example:
        >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 1.0]]))
        >>> of_class(x, sharing([["a"], ["a"], ["a"], ["b"]]), k=1)
        66.66666666666667
    """
    itself = torch.eye(len(x), dtype=torch.bool)
    right = same & ~itself
    nearest = (x @ x.T).masked_fill(itself, -torch.inf).topk(k).indices
    hits = right.gather(1, nearest).any(1)[right.any(1)]
    return 100 * hits.double().mean().item()


def vendor(tarball: Path, prefix: str, split: int, *, dev: float = VALIDATION) -> Source:
    """Return an icon set of the npm package, split by its drawings' concepts, of which ``dev`` is a share.

    Each held-out concept has one drawing; texts to train on are the captions in the icons' templates.
    """
    found: dict[str, list[package.Icon]] = {side: [] for side in SIDES}
    seen = set()
    every = package.icons_of(prefix, _one_set(tarball, prefix))
    for one in sorted(every, key=lambda one: drawings.hash_of(f"{split}/{one.set}/{one.name}")):
        side = drawings.side_of(f"{split}/{one.concept}", _TEST, dev)
        if side == "train" or one.concept not in seen:
            found[side].append(one)
        seen.add(one.concept)

    def of_one(icon: package.Icon, side: str) -> list[str]:
        forms = labels.TEMPLATES if side == "train" else ("{}",)
        return [form.format(icon.caption) for form in forms]

    def pictures(side: str) -> list[Image.Image]:
        return [Image.fromarray(draw.pixels(rasterise(one.svg, draw.SIZE))) for one in found[side]]

    categories = {side: [one.categories for one in found[side]] for side in ("dev", "test")}
    texts = {side: [of_one(one, side) for one in of] for side, of in found.items()}
    return Source(texts, pictures, categories=categories)


def _one_set(tarball: Path, prefix: str) -> dict[str, Any]:
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if Path(member.name).parts[1:] == ("json", f"{prefix}.json"):
                content: dict[str, Any] = json.load(archive.extractfile(member))
                return content
    raise ValueError(f"{tarball} holds no icon set {prefix!r}")


def icons_of(folder: Path, sizes: Sequence[int], split: int) -> Source:
    """Return the captions' icons, with as many more held-out concepts as a side of their own, and categories.

    The categories are those that the icons' sets give them.
    """
    build = icons.built(folder)
    train_size, held_out = sizes
    records = drawings.icon_records(build, train_size, held_out, 2 * held_out, split)
    records = {**records, "test": records["test"][:held_out], SECOND: records["test"][held_out:]}

    def side(name: str) -> drawings.Drawings:
        return drawings.drawn(build, records[name], name)

    texts = {name: [list(one) for one in side(name).captions] for name in records}
    categories = {name: [one.categories for one in records[name]] for name in ("dev", "test")}
    return Source(texts, lambda name: side(name).pictures, categories=categories)


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Splits]:
    """Return the data sets that are there; the vendor's is, if the icons are."""
    made = sources({name: size for name, size in sizes.sizes.items() if name != VENDOR}, options)
    for name in made:
        if name.startswith("icons"):
            made[name] = functools.partial(icons_of, options.icons, sizes.sizes[name])
    if VENDOR in sizes.sizes and (options.icons / "manifest.json").is_file():
        tarball = package.fetch(options.icons / "cache")
        made[VENDOR] = functools.partial(vendor, tarball, sizes.sizes[VENDOR])

    def splits(name: str, make: Callable[[int], Source]) -> Splits:
        folder = options.output / "spread" / sizes.preset / name
        return Splits(lambda split: Measured(make(split), folder))

    return {name: splits(name, make) for name, make in made.items()}
