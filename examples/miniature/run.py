"""The paper in miniature: train every loss on icons, measure, and write the report.

Run it as ``python examples/miniature/run.py``; see the README beside this file.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The examples whose code this one uses: the icons, the measures, and how the trainer is started.
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("icons", "evaluate", "openmoji"))]

from miniature_paper.grid import EXHIBITS, PRESETS, plan  # noqa: E402
from miniature_paper.terminal import (  # noqa: E402
    add_options,
    check_at_least_one,
    complete_options,
    import_parts,
    machine,
    reported,
    run_on,
    tracker,
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train CLIP, CyCLIP, ALIP and RankCLIP on icons and write the paper's tables and "
        "figures. What is there already is not done again, so an interrupted command is simply repeated.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="quick", help="how large (default: %(default)s)")
    add("--seeds", type=int, default=None, help="seeds 0 to N − 1 (default: as the preset says)", metavar="N")
    add(
        "--only",
        nargs="+",
        choices=EXHIBITS,
        default=EXHIBITS,
        metavar="EXHIBIT",
        help=f"train what these need: {', '.join(EXHIBITS)} (default: all)",
    )
    add_options(parser)
    add("--keep-checkpoints", action="store_true", help="keep weights and logs of runs that are measured")
    args = parser.parse_args(argv)
    check_at_least_one(parser, args, "seeds")
    complete_options(parser, args, records="full" if args.preset == "full" else "")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing and write the report."""
    args = _parse(argv)
    import_parts()
    return reported(lambda console: _run(args, console))


def _run(args: argparse.Namespace, console: Any) -> int:
    from miniature_paper.store import Store

    preset = PRESETS[args.preset]
    settings = plan(preset, args.only, range(args.seeds or preset.seeds))
    store = Store(args.results)
    failed: dict[Any, Exception] = {}
    odd: list[str] = []
    if args.report_only:
        records, odd = store.of(settings)
        for sentence in odd:
            console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)
    else:
        records, failed = _train(args, settings, store, console)
    console.rule("Report")
    if not records:
        raise RuntimeError(f"{args.results} holds no record of the {preset.name} preset: nothing to report")
    from miniature_paper import report

    report.write(records, args.report, preset=preset, planned=settings, command=_repeatable(args), notes=odd)
    missing = len(settings) - len(records)
    console.print(
        f"{len(records)} of {len(settings)} models"
        f"{f'; the same command without --report-only trains the other {missing}' if missing else ''}: "
        f"{args.report}",
        highlight=False,
        soft_wrap=True,
    )
    if failed:
        names = ", ".join(setting.name for setting in failed)
        console.print(f"Failed: {names}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _repeatable(args: argparse.Namespace) -> str:
    """Return the command that trains the same anywhere: without this machine's paths."""
    words = ["python examples/miniature/run.py --preset", args.preset]
    if args.seeds is not None:
        words += ["--seeds", str(args.seeds)]
    if tuple(args.only) != EXHIBITS:
        words += ["--only", *args.only]
    return " ".join(words)


def _train(
    args: argparse.Namespace, settings: Sequence[Any], store: Any, console: Any
) -> tuple[list[dict[str, Any]], dict[Any, Exception]]:
    from icons_data.load import load
    from miniature_paper import data
    from miniature_paper.runs import Runs, Workshop
    from miniature_paper.training import place_models

    where = machine(args.device, args.jobs)
    args.output.mkdir(parents=True, exist_ok=True)
    console.rule("Data")
    data.build_icons(args.icons)
    tables = data.prepare(load(args.icons), args.output, PRESETS[args.preset].sizes, tracker(console))
    place_models(args.output)
    runs = Runs(Workshop(args.output, args.icons, tables, store, where, args.keep_checkpoints))
    found = {setting: record for setting in settings if (record := runs.stored(setting)) is not None}
    todo = [setting for setting in settings if setting not in found]
    console.rule(f"Training and measuring, {where.jobs} at a time on {where.device}")
    console.print(f"{len(settings)} models, {len(found)} of them there already", highlight=False)
    failed: dict[Any, Exception] = {}
    if todo:
        known = [(setting, sum(record["seconds"].values())) for setting, record in found.items()]
        failed = run_on(console, todo, runs.make, where.jobs, known)
    records = [record for setting in settings if (record := runs.stored(setting)) is not None]
    return records, failed


if __name__ == "__main__":
    # The trainer's dependencies warn about each other's ages; none of it concerns a reader.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.exit(main())
