"""The command behind ``run.py``: evaluate one model on one data set after the other."""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import open_clip
import torch
from examples_common import tables
from examples_common.terminal import positive, say, status_of
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import normalize

from . import datasets, metrics, probe
from .datasets import ImageSet
from .geometry import geometry
from .model import ClipModel

TASKS = ("zero-shot", "probe", "retrieval", "geometry")
_FOR_CLASSES = ("zero-shot", "probe")
_PROMPTS = [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]  # where the data have none


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate a CLIP-like model on classification and retrieval data."
    )
    add = parser.add_argument
    add("--model", required=True, help="as for open_clip: an architecture, local-dir:FOLDER, hf-hub:NAME")
    add("--pretrained", help="a tag or a file of weights, as for open_clip")
    add("--checkpoint", type=Path, help="a checkpoint of open_clip's trainer")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    add("--batch-size", type=positive, default=256, help="default: %(default)s")
    add("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    add("--data", nargs="+", type=Path, required=True, help="folders in CLIP_benchmark's layout")
    default = "default: zero-shot for classification data, retrieval and geometry for captions"
    add("--tasks", nargs="+", choices=TASKS, help=default)
    add("--split", default="test", help="what is scored (default: %(default)s)")
    add("--output", type=Path, help="JSON file for the results")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement."""

    data: str
    task: str  # zero-shot, probe, retrieval or geometry
    metric: str  # such as top-1 or image_to_text R@5
    value: float
    n: int  # number of items
    chance: float | None = None  # what guessing would score, where that means something
    percent: bool = True  # whether the value is a share of the items

    @property
    def error(self) -> float | None:
        """Binomial standard error of a percentage; it holds for independent items."""
        return metrics.standard_error(self.value, self.n) if self.percent else None

    def cells(self) -> list[str]:
        """Return metric, value, standard error, chance and number of items as text."""
        value = f"{self.value:.2f}" if self.percent else f"{self.value:.4g}"
        optional = ("" if x is None else f"{x:.2f}" for x in (self.error, self.chance))
        return [self.metric, value, *optional, f"{self.n:,}"]


class Evaluation:
    """One model, evaluated on one data set after the other."""

    def __init__(self, model: ClipModel, args: argparse.Namespace, console: Console) -> None:
        self._model, self._args, self._console = model, args, console

    def run(self, source: Path) -> list[Result]:
        """Evaluate on one data set."""
        data = datasets.load(source, self._args.split, self._model.preprocess)
        tasks = self._args.tasks or (("retrieval", "geometry") if data.retrieval else ("zero-shot",))
        unfit = [task for task in tasks if (task in _FOR_CLASSES) == data.retrieval]
        if unfit:
            kind = "captions" if data.retrieval else "classes"
            raise ValueError(f"{source} has {kind}: {', '.join(unfit)} cannot be measured on it")
        features, targets = self._encode(data)
        if data.retrieval:
            return self._captions(data, tasks, features, targets)
        zero_shot = self._zero_shot(data, features, targets) if "zero-shot" in tasks else []
        return zero_shot + (self._probe(source, data, features, targets) if "probe" in tasks else [])

    def _encode(self, data: ImageSet) -> tuple[Tensor, list[Any]]:
        bar = partial(track, description=data.name, console=self._console)
        return self._model.image_features(data.images, progress=bar)

    def _zero_shot(self, data: ImageSet, features: Tensor, targets: list[int]) -> list[Result]:
        if not data.classes:
            raise ValueError(f"{data.name} does not name its classes: write them into classnames.txt")
        classifier = self._model.classifier(data.classes, data.templates or _PROMPTS)
        scores = normalize(features, dim=-1) @ classifier
        scored = metrics.named_accuracy(scores, torch.tensor(targets))
        return _results(data.name, "zero-shot", scored, len(scores))

    def _probe(self, source: Path, data: ImageSet, features: Tensor, targets: list[int]) -> list[Result]:
        names = [name for name in ("train", "validation") if datasets.has_split(source, name)]
        if "train" not in names:
            raise ValueError(f"{source} has no split train, which the probe needs")
        others = (datasets.load(source, name, self._model.preprocess) for name in names)
        splits = [(features, targets), *map(self._encode, others)]
        seen = [label for _, labels in splits for label in labels]
        classes = max(len(data.classes), max(seen) + 1)
        test, train, *validation = ((x, torch.tensor(labels)) for x, labels in splits)
        found = probe.linear_probe(train, test, *validation, classes=classes)
        edge = ", an end of the range tried" if found.at_edge else ""
        return [
            *_results(data.name, "probe", metrics.named_accuracy(found.scores, test[1]), len(found.scores)),
            Result(data.name, "probe", f"strength C{edge}", found.strength, len(train[1]), percent=False),
        ]

    def _captions(
        self, data: ImageSet, tasks: Sequence[str], features: Tensor, captions: list[list[str]]
    ) -> list[Result]:
        image_of = torch.tensor([image for image, texts in enumerate(captions) for _ in texts])
        texts = [text for own in captions for text in own]
        images, encoded = normalize(features, dim=-1), self._model.text_features(texts)
        results = []
        if "retrieval" in tasks:
            for name, scored in metrics.named_recall(images, encoded, image_of).items():
                n = len(images) if name.startswith("image_to_text") else len(texts)
                results += _results(data.name, "retrieval", {name: scored}, n)
        if "geometry" in tasks:
            first = torch.tensor([True, *(image_of[1:] != image_of[:-1]).tolist()])
            measured = {**geometry(images, encoded[first]), "logit_scale": self._model.logit_scale}
            results += [
                Result(data.name, "geometry", name, value, len(images), percent=False)
                for name, value in measured.items()
            ]
        return results


def _results(data: str, task: str, scored: metrics.Scored, n: int) -> list[Result]:
    return [Result(data, task, name, value, n, guess) for name, (value, guess) in scored.items()]


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    rows = []
    for (data, task), of_task in groupby(results, key=lambda result: (result.data, result.task)):
        first, *others = of_task
        rows += [[data, task, *first.cells()], *(["", "", *result.cells()] for result in others)]
    tables.show(console, ["data", "task", "metric", "value", "± SE", "chance", "n"], rows, right=4)


def save(path: Path, results: Sequence[Result], conditions: dict[str, Any]) -> None:
    """Write results and conditions as JSON."""
    rows = [{**dataclasses.asdict(result), "standard_error": result.error} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"conditions": conditions, "results": rows}, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table and write JSON."""
    return status_of(partial(_run, parse(argv)))


def _run(args: argparse.Namespace, console: Console) -> int:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    options = ("pretrained", "checkpoint", "device", "batch_size", "workers")
    model = ClipModel(args.model, **{name: getattr(args, name) for name in options})
    evaluation = Evaluation(model, args, console)
    results = [result for source in args.data for result in evaluation.run(source)]
    show(results, console)
    if args.output is not None:
        conditions = {
            **{name: str(value) for name, value in vars(args).items() if value is not None},
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - started, 1),
        }
        save(args.output, results, conditions)
        say(console, f"Wrote {args.output}")
    return 0
