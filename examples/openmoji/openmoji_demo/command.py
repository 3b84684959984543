"""The command behind ``run.py``: data, training, evaluation and picture; finished stages are skipped."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from examples_common.terminal import positive, say, status_of, tracker
from examples_common.trainer import place_model
from rich.console import Console

from . import data, draw, evaluate, report
from .train import Run, read_scalars

_MODEL = Path(__file__).resolve().parents[1] / "model"
# What the demo itself decides or reads back: passing these on would contradict it.
_OWNED = (
    "--loss", "--seed", "--epochs", "--device", "--model", "--train-data", "--logs", "--name", "--report-to",
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    extra: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, extra = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        description="Train a small CLIP on OpenMoji with a ranking loss, and evaluate it on held-out emojis.",
        epilog="Everything after -- is passed to open_clip's trainer, for instance: -- --lr 5e-4",
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/openmoji"), help="folder for everything")
    add(
        "--loss",
        nargs="+",
        default=["rankclip"],
        help="passed to the trainer as it is; several are trained one after the other and share the table, "
        "for instance: --loss clip rankclip (default: rankclip)",
    )
    add("--epochs", type=positive, default=8, help="default: %(default)s")
    add("--seed", type=int, default=0, help="the trainer's seed (default: %(default)s)")
    add("--split", type=int, default=0, help="which concepts are held out (default: %(default)s)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args(arguments)
    for given in extra:
        if given.split("=")[0] in _OWNED:
            parser.error(f"{given.split('=')[0]} after --: give it before --, or leave it to the demo")
    args.loss = list(dict.fromkeys(args.loss))
    args.extra = tuple(extra)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    args = parse(argv)
    return status_of(lambda console: _demo(args, console))


def _demo(args: argparse.Namespace, console: Console) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    root: Path = args.output.resolve()
    folder = root / "data" / f"split{args.split}"
    root.mkdir(parents=True, exist_ok=True)

    console.rule("1/4  Data")
    if data.is_complete(folder, args.split):
        say(console, f"Complete already: {folder}")
    else:
        counts = data.build(folder, root=root, split=args.split, track=tracker(console))["counts"]
        say(
            console,
            f"{counts['train_rows']} captions of {counts['train_images']} pictures "
            f"({counts['train_concepts']} concepts) to train on, "
            f"{counts['test_concepts']} held-out concepts: {folder}",
        )
    say(console, "Emojis by OpenMoji, CC BY-SA 4.0; see ATTRIBUTION.md there.", "dim")
    place_model(_MODEL, root / "model")

    console.rule("2/4  Training, by open_clip's own command")
    runs = [
        Run(root, folder.relative_to(root).as_posix(), loss, args.seed, args.epochs, device, args.extra)
        for loss in args.loss
    ]
    for run in runs:
        if run.is_complete():
            say(console, f"Complete already: {run.folder}")
        else:
            run.train(console)
            say(console, f"Trained {run.loss} in {run.seconds:.0f} s on {device}.")

    console.rule("3/4  Evaluation on held-out concepts")
    started = time.monotonic()
    methods: dict[str, Any] = {report.KNN: evaluate.load_pixel_knn(root, folder)}
    for run in runs:
        methods[report.label_of(run.loss)] = evaluate.ClipModel(root / "model", run.checkpoint, device)
    blocks, similarities, test_sets = [], {}, {}
    for style in evaluate.STYLES:
        test_set = test_sets[style] = evaluate.load_test_set(root, folder, style)
        rows = {report.CHANCE: evaluate.chance_scores(test_set)}
        for name, method in methods.items():
            rows[name], similarities[style, name] = evaluate.score(method, test_set)
        classes = (len(test_set.subgroup_classes), len(test_set.group_classes))
        blocks.append(report.Block(style, len(test_set.images), *classes, rows))
    report.show(blocks, console)
    conditions = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "split": args.split,
        "seed": args.seed,
        "epochs": args.epochs,
        "runs": {run.loss: {"seconds": run.seconds, "command": run.command()[1:]} for run in runs},
    }
    report.save(blocks, conditions, root)
    say(console, f"Evaluated in {time.monotonic() - started:.0f} s.")

    console.rule("4/4  Picture")
    label = report.label_of(runs[-1].loss)
    draw.draw(
        root / "openmoji.png",
        title=label,
        test_set=test_sets["color"],
        similarity=similarities["color", label],
        curves={report.label_of(run.loss): read_scalars(run.folder) for run in runs},
        epochs=args.epochs,
    )
    for name in ("openmoji.png", "results.md", "results.json"):
        say(console, f"Wrote {root / name}")
    return 0
