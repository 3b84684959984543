"""Evaluate any CLIP-like model of open_clip: zero-shot, retrieval, linear probe, geometry.

``python examples/evaluate/run.py --model ViT-B-32 --checkpoint epoch_32.pt --data FOLDER``; see the README
beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_evaluation.datasets import ImageSet
    from clip_evaluation.model import ClipModel
    from clip_evaluation.report import Result
    from torch import Tensor

TASKS = ("zero-shot", "probe", "retrieval", "geometry")
_FOR_CLASSES = ("zero-shot", "probe")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=None,
        help="default: zero-shot for classification data, retrieval and geometry for captions",
    )
    add("--split", default="test", help="what is scored (default: %(default)s)")
    add("--train-split", default="train", help="what a probe is trained on (default: %(default)s)")
    add(
        "--validation-split",
        default="validation",
        help="what its regularisation is chosen on; without it a fifth of the training items is (default: "
        "%(default)s)",
    )
    add("--train-data", help="where the training split is, if it is not in --data (one --data only)")
    add("--class-names", help="imagenet, or a file with a name a line (default: as the data say)")
    add(
        "--templates",
        default=None,
        help="openai, simple, or a file with a prompt a line, {} for the name "
        "(default: those of the data, else simple)",
    )
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


class Evaluation:
    """One model, one data set after the other."""

    def __init__(self, model: ClipModel, args: argparse.Namespace, progress: Any) -> None:
        self._model = model
        self._args = args
        self._progress = progress

    def run(self, source: str) -> list[Result]:
        """Evaluate on one data set.

        Raises:
            ValueError: If a task asked for does not fit the data.
        """
        data = self._load(source, self._args.split)
        tasks = self._args.tasks or (("retrieval", "geometry") if data.retrieval else ("zero-shot",))
        unfit = [task for task in tasks if (task in _FOR_CLASSES) == data.retrieval]
        if unfit:
            kind = "captions" if data.retrieval else "classes"
            raise ValueError(f"{source} has {kind}: {', '.join(unfit)} cannot be measured on it")
        features, targets = self._encode(data)
        if data.retrieval:
            return self._captions(data, tasks, features, targets)
        results = []
        if "zero-shot" in tasks:
            results += self._zero_shot(data, features, targets)
        if "probe" in tasks:
            results += self._probe(source, data, features, targets)
        return results

    def _load(self, source: str, split: str) -> ImageSet:
        from clip_evaluation import datasets

        args = self._args
        return datasets.load(
            source,
            split,
            self._model.preprocess,
            class_names=args.class_names,
            columns=datasets.Columns(
                args.csv_image_key, args.csv_caption_key, args.csv_label_key, args.csv_separator
            ),
            image_folder=args.image_folder,
            root=args.root,
            download=args.download,
        )

    def _encode(self, data: ImageSet) -> tuple[Tensor, list[Any]]:
        return self._model.image_features(data.images, progress=lambda it: self._progress(it, data.name))

    def _zero_shot(self, data: ImageSet, features: Tensor, targets: list[int]) -> list[Result]:
        import torch
        from clip_evaluation import metrics
        from clip_evaluation.report import Result
        from torch.nn.functional import normalize

        if data.classes is None:
            raise ValueError(f"{data.name} does not name its classes: give --class-names")
        classifier = self._model.classifier(data.classes, _templates(self._args.templates, data.templates))
        scores, labels = normalize(features, dim=-1) @ classifier, torch.tensor(targets)
        guess = metrics.chance(len(data.classes), metrics.CLASS_KS)
        top = metrics.accuracy_at_k(scores, labels)
        rows = [Result(data.name, "zero-shot", f"top-{k}", top[k], len(labels), guess[k]) for k in top]
        mean = metrics.mean_per_class_accuracy(scores, labels)
        return [*rows, Result(data.name, "zero-shot", "mean per class", mean, len(labels), guess[1])]

    def _probe(self, source: str, data: ImageSet, features: Tensor, targets: list[int]) -> list[Result]:
        import torch
        from clip_evaluation import datasets, metrics, probe
        from clip_evaluation.report import Result

        args = self._args
        where = args.train_data or source
        if not args.train_data and not datasets.has_split(source, args.train_split):
            raise ValueError(f"{source} has no split {args.train_split!r} for the probe: give --train-data")
        train = self._encode(self._load(where, args.train_split))
        held_out = None
        if datasets.has_split(where, args.validation_split):
            held_out = self._encode(self._load(where, args.validation_split))
        seen = [*targets, *train[1], *(held_out[1] if held_out else ())]
        classes = len(data.classes) if data.classes is not None else max(seen) + 1
        found = probe.linear_probe(
            (train[0], torch.tensor(train[1])),
            (features, torch.tensor(targets)),
            (held_out[0], torch.tensor(held_out[1])) if held_out else None,
            classes=classes,
        )
        guess = metrics.chance(classes, metrics.CLASS_KS)
        n = len(targets)
        return [
            *(Result(data.name, "probe", f"top-{k}", v, n, guess[k]) for k, v in found.accuracy.items()),
            Result(data.name, "probe", "mean per class", found.mean_per_class, n, guess[1]),
            Result(
                data.name,
                "probe",
                f"strength C{', an end of the range tried' if found.at_edge else ''}",
                found.strength,
                len(train[1]),
                percent=False,
            ),
        ]

    def _captions(
        self, data: ImageSet, tasks: Sequence[str], features: Tensor, captions: list[list[str]]
    ) -> list[Result]:
        import torch
        from clip_evaluation import metrics
        from clip_evaluation.geometry import geometry
        from clip_evaluation.report import Result
        from torch.nn.functional import normalize

        image_of = torch.tensor([image for image, texts in enumerate(captions) for _ in texts])
        texts = [self._args.caption_prefix + text for own in captions for text in own]
        images, encoded = normalize(features, dim=-1), self._model.text_features(texts)
        results = []
        if "retrieval" in tasks:
            guess = metrics.retrieval_chance(len(images), image_of)
            for task, recall in metrics.retrieval(images, encoded, image_of).items():
                n = len(images) if task == "image_to_text" else len(texts)
                results += [
                    Result(data.name, "retrieval", f"{task} R@{k}", value, n, guess[task][k])
                    for k, value in recall.items()
                ]
        if "geometry" in tasks:
            first = torch.tensor([True, *(image_of[1:] != image_of[:-1]).tolist()])
            measured = geometry(images, encoded[first])
            measured["logit_scale"] = self._model.logit_scale
            results += [
                Result(data.name, "geometry", name, value, len(images), percent=False)
                for name, value in measured.items()
            ]
        return results


def _templates(given: str | None, of_data: list[str] | None) -> list[str]:
    import open_clip

    if given is None and of_data:
        return of_data
    if given in ("openai", "simple", None):
        of_imagenet = (
            open_clip.OPENAI_IMAGENET_TEMPLATES if given == "openai" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
        return [template("{}") for template in of_imagenet]
    return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table and write JSON."""
    args = _parse(argv)
    try:
        import torch
        from clip_evaluation import report
        from clip_evaluation.model import ClipModel
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError as error:
        sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]'")
    console = Console()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def progress(batches: Iterable[Any], what: str) -> Iterable[Any]:
        try:
            total = len(batches)  # type: ignore[arg-type]
        except TypeError:  # shards do not say how much is in them
            total = None
        return track(batches, description=what, total=total, console=console)

    started = time.monotonic()
    results: list[Result] = []
    try:
        model = ClipModel(
            args.model,
            pretrained=args.pretrained,
            checkpoint=args.checkpoint,
            device=device,
            precision=args.precision,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        evaluation = Evaluation(model, args, progress)
        for source in args.data:
            results += evaluation.run(source)
    except (ValueError, FileNotFoundError) as error:
        console.print(f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    report.show(results, console)
    conditions = {
        **{name: str(value) for name, value in vars(args).items() if value is not None},
        "device": device,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }
    if args.output is not None:
        report.save(args.output, results, conditions)
        console.print(f"Wrote {args.output}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
