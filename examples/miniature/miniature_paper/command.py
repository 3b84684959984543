"""The command behind ``run.py``: train the grid's missing models, measure them, and write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from examples_common.records import Store
from examples_common.terminal import positive, say, status_of
from rich.console import Console

from . import report
from .grid import EXHIBITS, PRESETS, plan
from .options import add_options, complete_options, prepare


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Train CLIP, CyCLIP, ALIP and RankCLIP on icons and write the paper's tables and "
        "figures. Finished models are kept, so an interrupted command is simply repeated.",
        allow_abbrev=False,
    )
    add_options(parser, tuple(PRESETS))
    add = parser.add_argument
    add("--seeds", type=positive, metavar="N", help="seeds 0 to N − 1 (default: as the preset says)")
    add(
        "--only",
        nargs="+",
        choices=EXHIBITS,
        default=EXHIBITS,
        metavar="EXHIBIT",
        help=f"train what these need: {', '.join(EXHIBITS)} (default: all)",
    )
    args = parser.parse_args(argv)
    complete_options(parser, args, records="full" if args.preset == "full" else "")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing and write the report."""
    args = parse(argv)
    return status_of(lambda console: _run(args, console))


def _run(args: argparse.Namespace, console: Console) -> int:
    preset = PRESETS[args.preset]
    settings = plan(preset, args.only, range(args.seeds or preset.seeds))
    done = True
    if args.report_only:
        records = Store(args.results).of(settings)
    else:
        workshop = prepare(args, preset.sizes, console)
        done = workshop.do("Training and measuring", settings, console)
        records = list(workshop.find(settings).values())
    console.rule("Report")
    if not records:
        raise RuntimeError(f"{args.results} holds no record of the {preset.name} preset: nothing to report")
    page = report.write(records, args.report, preset=preset, planned=settings, command=_typed(args))
    say(console, f"{len(records)} of {len(settings)} models: {page}")
    return 0 if done else 1


def _typed(args: argparse.Namespace) -> str:
    """Return the command that trains the same models on any machine."""
    words = ["python examples/miniature/run.py --preset", args.preset]
    if args.seeds is not None:
        words += ["--seeds", str(args.seeds)]
    if tuple(args.only) != EXHIBITS:
        words += ["--only", *args.only]
    return " ".join(words)
