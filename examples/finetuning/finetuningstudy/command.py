"""The command: build the icons, do the missing trainings, write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples_common.records import Store
from examples_common.study_command import home, study_parser
from examples_common.terminal import say, status_of
from icons_data.load import load
from miniature_paper.data import build_icons
from rich.console import Console

from . import plan, report, task
from .study import Study

_EXAMPLE = Path(__file__).resolve().parents[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = study_parser(
        "Fine-tune a CLIP of icons on emojis, with and without its own past as teacher. Finished "
        "trainings are kept: repeat an interrupted command.",
        plan.PLANS,
        "outputs/finetuning",
        "the starting checkpoints and of the quick preset",
    )
    icons = "folder of the icons, built if missing"
    parser.add_argument("--icons", type=Path, default=Path("outputs/icons"), help=icons)
    args = parser.parse_args(argv)
    args.home = home(args, _EXAMPLE)
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
