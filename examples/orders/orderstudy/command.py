"""The command: compute features, do the missing trainings, write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples_common.records import Store
from examples_common.terminal import say, status_of
from photostudy.command import fill
from photostudy.features import Cache, FrozenEncoders
from photostudy.folder import SPLITS, WHERE, read
from rich.console import Console

from . import plan, report, task
from .plan import Plan
from .study import Study

_EXAMPLE = Path(__file__).resolve().parents[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="In-batch ranking by ordered ids on emojis and, with --data, on photographs. Finished "
        "trainings are kept: repeat an interrupted command.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, help="the folder of Flickr8k; features are kept in it, too")
    add("--preset", choices=plan.PLANS, default="quick", help="size (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("outputs/orders"),
        help="folder of the emojis' features and of the quick preset (default: %(default)s)",
    )
    add("--report-only", action="store_true", help="train nothing; report the records that are there")
    args = parser.parse_args(argv)
    # The full preset's records are part of the repository: runs resume from them.
    args.home = _EXAMPLE if args.preset == "full" else args.output / args.preset
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
            cache = Cache(pictures, FrozenEncoders.name)
            names = {**pictures.splits, "train": pictures.splits["train"][: sizes.train_pictures]}
            fill(cache, [names[side] for side in SPLITS], console)
            ranked = task.of_photographs(pictures, cache, sizes.train_pictures)
            Study("photographs", ranked, stores["photographs"]).follow(sizes, console)
    say(console, str(report.write(sizes, stores, args.home / "report")))
    return 0
