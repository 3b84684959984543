"""The command behind ``run.py`` and its arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import arms
from .terminal import positive, status_of

# Set by the demo itself, so they cannot be passed on.
_OWNED = (
    "--loss",
    "--seed",
    "--epochs",
    "--device",
    "--model",
    "--train-data",
    "--logs",
    "--name",
    "--report-to",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small CLIP on OpenMoji in several ways, and evaluate it on held-out emojis.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/openmoji"), help="folder for everything")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=arms.DEFAULT,
        metavar="ARM",
        help="trainings to compare: clip, rankclip, encoders (CLIP taught by two encoders), or any other "
        f"value of the trainer's --loss (default: {' '.join(arms.DEFAULT)})",
    )
    parser.add_argument("--epochs", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the trainer's seed (default: %(default)s)")
    parser.add_argument(
        "--split", type=int, default=0, help="which concepts are held out (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument(
        "extra", nargs="*", metavar="-- …", help="passed to open_clip's trainer, for instance: -- --lr 5e-4"
    )
    args = parser.parse_args(argv)
    if args.extra and not args.extra[0].startswith("-"):
        parser.error(f"unrecognized argument: {args.extra[0]}")
    for word in args.extra:
        name, _, _ = word.partition("=")
        if name in _OWNED:
            parser.error(f"{name} after --: give it before --, or leave it to the demo")
    args.arms = [arms.find(name) for name in dict.fromkeys(args.arms)]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    args = parse(argv)

    def run(console: Console) -> int:
        with console.status("Starting"):
            from . import demo  # imports torch and more, which takes seconds
        demo.run(args, console)
        return 0

    return status_of(run)
