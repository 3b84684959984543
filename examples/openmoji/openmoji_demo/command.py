"""The command behind ``run.py``: its arguments, and the bar that stands over all stages."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples_common.terminal import positive, status_of
from rich.console import Console

from .progress import Forecast, bar, expected
from .train import cores

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
        default=["clip", "rankclip"],
        help="passed to the trainer as they are; as many are trained side by side as there are cores "
        "(default: clip rankclip)",
    )
    add("--epochs", type=positive, default=6, help="default: %(default)s")
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
    forecast = Forecast(expected(args.epochs, len(args.loss), cores()))
    with bar(console, forecast):
        from . import demo  # torch and the like take seconds to import: the bar moves before that

        demo.run(args, console, forecast)
    return 0
