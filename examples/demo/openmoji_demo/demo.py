"""The demo's stages: data, trainings, evaluation and picture; finished ones are skipped."""

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown

import rankloss

from . import data, draw, evaluate, report
from .terminal import say, tracker
from .train import Run, arguments_for, train_all
from .trainer import place_model

_MODEL = Path(__file__).resolve().parents[1] / "model"


class _Evaluation(NamedTuple):
    """The evaluation of the trained models."""

    blocks: list[report.Block]  # a style each, of which the first is colour
    answers: dict[tuple[str, str], evaluate.Answers]  # by style and method
    test_sets: dict[str, evaluate.TestSet]  # by style
    training: evaluate.Pictures  # the first of each concept
    rankings: evaluate.Agreement
    found: dict[str, evaluate.Found]


def run(args: argparse.Namespace, console: Console) -> None:
    """Go through all stages."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    root: Path = args.output.resolve()
    folder = root / "data" / f"split{args.split}"
    root.mkdir(parents=True, exist_ok=True)

    say(console, "About 7 minutes on 2 idle cores; repeat the command to resume.")
    console.rule("1/4  Data")
    _prepare(root, folder, args.split, console)

    console.rule("2/4  Training, by open_clip's own command")
    pairs = folder.relative_to(root).as_posix()
    runs = [
        Run(root, pairs, arm, args.seed, args.epochs, device, arguments_for(arm.loss, args.extra))
        for arm in args.arms
    ]
    _train(runs, device, console)

    console.rule("3/4  Evaluation on held-out concepts")
    blocks, answers, test_sets, training, rankings, found = _evaluate(runs, root, folder, device, console)
    conditions = {
        "device": device,
        "torch": torch.__version__,
        "rankloss": rankloss.__version__,
        "split": args.split,
        "seed": args.seed,
        "epochs": args.epochs,
        "runs": {run.arm.name: run.record() for run in runs},
    }
    report.save(blocks, found, rankings, conditions, root)
    rankings.save(root / "agreement.json")

    console.rule("4/4  Picture")
    draw.draw(
        root / "openmoji.png",
        agreement=rankings,
        picture=training.images[rankings.anchor],
        block=blocks[0],
        found=found,
        test_set=test_sets["color"],
        similarities={run.arm.label: answers["color", run.arm.label].similarity for run in runs},
    )
    console.print(Markdown(report.markdown(blocks, found, rankings)))
    for name in ("openmoji.png", "results.md", "results.json", "agreement.json"):
        say(console, f"Wrote {root / name}")
    for text in report.closing(blocks[0], found, rankings):
        say(console, text)


def _prepare(root: Path, folder: Path, split: int, console: Console) -> None:
    """Build the data unless they are complete, and place the model's architecture beside them."""
    if data.is_complete(folder, split):
        say(console, f"Complete already: {folder}")
    else:
        counts = data.build(folder, root=root, split=split, track=tracker(console))["counts"]
        say(
            console,
            f"{counts['train_rows']} captions of {counts['train_images']} pictures "
            f"({counts['train_concepts']} concepts) to train on, "
            f"{counts['test_concepts']} held-out concepts: {folder}",
        )
    say(console, "Emojis by OpenMoji, CC BY-SA 4.0; see ATTRIBUTION.md there.", "dim")
    place_model(_MODEL, root / "model")


def _evaluate(runs: list[Run], root: Path, folder: Path, device: str, console: Console) -> _Evaluation:
    """Evaluate the models, chance and untrained pixels on the held-out concepts in both styles."""
    load = partial(evaluate.ClipModel, f"local-dir:{root / 'model'}", device=device)
    models = {run.arm.label: load(checkpoint=run.checkpoint) for run in runs}
    emojis = evaluate.load_pictures(root, folder / "train_emojis.csv")
    methods: dict[str, evaluate.Method] = {report.KNN: partial(evaluate.knn_answers, emojis)}
    methods |= {name: model.answers for name, model in models.items()}
    blocks: list[report.Block] = []
    answers: dict[tuple[str, str], evaluate.Answers] = {}
    test_sets: dict[str, evaluate.TestSet] = {}
    for style in tracker(console)(evaluate.STYLES, len(evaluate.STYLES), "Evaluating"):
        test_set = test_sets[style] = evaluate.load_test_set(root, folder, style)
        rows = {report.CHANCE: evaluate.chance_scores(test_set)}
        for name, method in methods.items():
            answers[style, name] = method(test_set)
            rows[name] = evaluate.score(answers[style, name], test_set)
        classes = {level: len(names) for level, names in test_set.classes.items()}
        blocks.append(report.Block(style, len(test_set.images), classes["subgroup"], classes["group"], rows))
    training = evaluate.load_pictures(root, folder / "train_emojis.csv", once=True)
    held_out = evaluate.load_pictures(root, folder / "test.csv", once=True)
    rankings = evaluate.measure_agreement(models, training, held_out)
    found = evaluate.compare({name: answers["color", name].ranks for name in models})
    return _Evaluation(blocks, answers, test_sets, training, rankings, found)


def _train(runs: list[Run], device: str, console: Console) -> None:
    """Train the runs that are not complete."""
    todo = []
    for run in runs:
        if run.is_complete():
            say(console, f"Complete already: {run.folder}")
        else:
            todo.append(run)
    for run in todo:
        _say_command(console, run.root, run.command())
        say(console, f"Log: {run.folder / 'out.log'}")
    if todo:
        train_all(todo, device, console)


def _say_command(console: Console, root: Path, command: Sequence[str]) -> None:
    """Show a command as it can be typed."""
    words = shlex.join(["python", *command[1:]]).replace("\t", "\\t")
    say(console, f"$ cd {root} && {words}", "dim")
