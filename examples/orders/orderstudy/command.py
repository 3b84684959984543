"""The command: compute features, do the missing trainings, write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples_common.records import Store
from examples_common.study_command import home, study_parser
from examples_common.terminal import say, status_of
from photostudy.command import cached
from photostudy.features import FrozenEncoders
from photostudy.folder import WHERE, read
from rich.console import Console

from . import plan, report, task
from .plan import Plan
from .study import Study

_EXAMPLE = Path(__file__).resolve().parents[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = study_parser(
        "In-batch ranking by ordered ids on emojis and, with --data, on photographs. Finished "
        "trainings are kept: repeat an interrupted command.",
        plan.PLANS,
        "outputs/orders",
        "the emojis' features and of the quick preset",
    )
    parser.add_argument("--data", type=Path, help="the folder of Flickr8k; features are kept in it, too")
    args = parser.parse_args(argv)
    args.home = home(args, _EXAMPLE)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing trainings and write the report."""
    args = parse(argv)
    return status_of(lambda console: _run(args, plan.PLANS[args.preset], console))


def _run(args: argparse.Namespace, sizes: Plan, console: Console) -> int:
    stores = {name: Store(args.home / "results" / name) for name in plan.SECONDARY}
    if not args.report_only:
        ranked = task.of_emojis(args.output / "features", FrozenEncoders(), sizes.emojis)
        Study("emojis", ranked, stores["emojis"]).follow(sizes, console)
        if args.data is None:
            say(console, f"The photographs are left out: --data names their folder.\n{WHERE}")
        else:
            pictures = read(args.data)
            cache = cached(pictures, sizes.train_pictures, console)
            ranked = task.of_photographs(pictures, cache, sizes.train_pictures)
            Study("photographs", ranked, stores["photographs"]).follow(sizes, console)
    say(console, str(report.write(sizes, stores, args.home / "report")))
    return 0
