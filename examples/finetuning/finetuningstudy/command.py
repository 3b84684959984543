"""The command: build the icons, do the missing trainings, write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples_common.records import Store
from examples_common.terminal import say, status_of
from icons_data.load import load
from miniature_paper.data import build_icons
from rich.console import Console

from . import plan, report, task
from .study import Study

_EXAMPLE = Path(__file__).resolve().parents[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a CLIP of icons on emojis, with and without its own past as teacher. Finished "
        "trainings are kept: repeat an interrupted command.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--icons",
        type=Path,
        default=Path("outputs/icons"),
        help="folder of the icons, built if missing",
    )
    add("--preset", choices=plan.PLANS, default="quick", help="size (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("outputs/finetuning"),
        help="folder of the starting checkpoints and of the quick preset (default: %(default)s)",
    )
    add("--report-only", action="store_true", help="train nothing; report the records that are there")
    args = parser.parse_args(argv)
    # The full preset's records are part of the repository: runs resume from them.
    args.home = _EXAMPLE if args.preset == "full" else args.output / args.preset
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing trainings and write the report."""
    args = parse(argv)
    return status_of(lambda console: _run(args, console))


def _run(args: argparse.Namespace, console: Console) -> int:
    sizes, store = plan.PLANS[args.preset], Store(args.home / "results")
    if not args.report_only:
        build_icons(args.icons)
        pairs = task.read(
            load(args.icons), pretrained=sizes.pretrained, held_out=sizes.held_out, emojis=sizes.emojis
        )
        Study(pairs, store, args.output / "checkpoints").follow(sizes, console)
    say(console, str(report.write(sizes, store, args.home / "report")))
    return 0
