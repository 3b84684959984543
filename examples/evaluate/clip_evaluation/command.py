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
from examples_common.terminal import say, status_of
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
    add("--precision", default="fp32", help="as for open_clip (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="default: %(default)s")
    add("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    add("--data", nargs="+", required=True, help="folders, tables, COCO captions, torchvision:NAME")
    default = "default: zero-shot for classification data, retrieval and geometry for captions"
    add("--tasks", nargs="+", choices=TASKS, help=default)
    add("--split", default="test", help="what is scored (default: %(default)s)")
    add("--train-split", default="train", help="what a probe is trained on (default: %(default)s)")
    chosen = "what its regularisation is chosen on; without it, a fifth of the training items"
    add("--validation-split", default="validation", help=f"{chosen} (default: %(default)s)")
    add("--train-data", help="where the training split is, if not in --data (one --data only)")
    add("--class-names", help="imagenet, or a file with one name per line (default: as the data say)")
    prompts = "openai, simple, or a file with one prompt per line, {} for the name"
    add("--templates", help=f"{prompts} (default: those of the data, else simple)")
    add("--csv-image-key", default="filepath", help="column of image paths (default: %(default)s)")
    add("--csv-caption-key", default="title", help="column of captions (default: %(default)s)")
    add("--csv-label-key", default="label", help="column of class names, if any (default: %(default)s)")
    add("--csv-separator", default="\t", help="default: a tab")
    add("--image-folder", type=Path, help="where the images of COCO's captions are")
    add("--caption-prefix", default="", help="put before every caption, for instance 'a photo of '")
    add("--root", type=Path, default=Path("data"), help="torchvision's data (default: %(default)s)")
    add("--download", action="store_true", help="let torchvision fetch data")
    add("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    if args.train_data and len(args.data) > 1:
        parser.error("argument --train-data: only with a single --data")
    return args


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

    def run(self, source: str) -> list[Result]:
        """Evaluate on one data set."""
        data = self._load(source, self._args.split)
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

    def _load(self, source: str, split: str) -> ImageSet:
        names = ("class_names", "image_folder", "root", "download")
        columns = ("csv_image_key", "csv_caption_key", "csv_label_key", "csv_separator")
        options = {name: getattr(self._args, name) for name in (*names, *columns)}
        return datasets.load(source, split, self._model.preprocess, **options)

    def _encode(self, data: ImageSet) -> tuple[Tensor, list[Any]]:
        bar = partial(track, description=data.name, console=self._console)
        return self._model.image_features(data.images, progress=bar)

    def _zero_shot(self, data: ImageSet, features: Tensor, targets: list[int]) -> list[Result]:
        if data.classes is None:
            raise ValueError(f"{data.name} does not name its classes: give --class-names")
        classifier = self._model.classifier(data.classes, templates(self._args.templates, data.templates))
        scores = normalize(features, dim=-1) @ classifier
        scored = metrics.named_accuracy(scores, torch.tensor(targets))
        return _results(data.name, "zero-shot", scored, len(scores))

    def _probe(self, source: str, data: ImageSet, features: Tensor, targets: list[int]) -> list[Result]:
        args = self._args
        where = args.train_data or source
        if not args.train_data and not datasets.has_split(source, args.train_split):
            raise ValueError(f"{source} has no split {args.train_split!r} for the probe: give --train-data")
        splits = [(features, targets), self._encode(self._load(where, args.train_split))]
        if datasets.has_split(where, args.validation_split):
            splits.append(self._encode(self._load(where, args.validation_split)))
        seen = [label for _, labels in splits for label in labels]
        classes = len(data.classes) if data.classes is not None else max(seen) + 1
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
        texts = [self._args.caption_prefix + text for own in captions for text in own]
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


def templates(given: str | None, of_data: list[str] | None) -> list[str]:
    """Return the prompts of ``--templates``, or those that come with the data."""
    if given is None and of_data:
        return of_data
    if given in ("openai", "simple", None):
        openai, simple = open_clip.OPENAI_IMAGENET_TEMPLATES, open_clip.SIMPLE_IMAGENET_TEMPLATES
        return [template("{}") for template in (openai if given == "openai" else simple)]
    return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table and write JSON."""
    return status_of(partial(_run, parse(argv)))


def _run(args: argparse.Namespace, console: Console) -> int:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    options = ("pretrained", "checkpoint", "device", "precision", "batch_size", "workers")
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
