"""Search for the setting in which the rank terms help most, and confirm it once.

Run it as ``python examples/miniature/search.py``; see the README beside this file.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("icons", "evaluate", "openmoji"))]

from miniature_paper.search.trials import SEARCHES, Search  # noqa: E402
from miniature_paper.terminal import (  # noqa: E402
    add_options,
    complete_options,
    import_parts,
    machine,
    reported,
    run_on,
    tracker,
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Search on the validation side for the setting in which RankCLIP's terms help most, "
        "by successive halving, and confirm the winner once on the test side. What is there already is not "
        "done again, so an interrupted command is simply repeated.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(SEARCHES), default="quick", help="how large (default: %(default)s)")
    add("--confirm", action="store_true", help="confirm the winner on the test side; possible once")
    add(
        "--again",
        action="store_true",
        help="with --confirm: confirm once more, with other seeds; the report says so",
    )
    add_options(parser)
    args = parser.parse_args(argv)
    complete_options(parser, args, records="search")
    if args.again and not args.confirm:
        parser.error("argument --again: only with --confirm")
    if args.report_only and args.confirm:
        parser.error("argument --report-only: not with --confirm, which trains")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do the rounds that are missing, confirm if asked to, and write the report."""
    args = _parse(argv)
    import_parts()
    return reported(lambda console: _run(args, SEARCHES[args.preset], console))


def _run(args: argparse.Namespace, search: Search, console: Any) -> int:
    from functools import partial

    from miniature_paper.search import report
    from miniature_paper.search.confirmation import Declarations, confirm
    from miniature_paper.search.ladder import climb, winner
    from miniature_paper.search.trainings import stored
    from miniature_paper.store import Store

    store = Store(args.results)
    declarations = Declarations(args.results)
    done = True
    if args.report_only:
        find = partial(stored, store)
        steps = climb(search, find)
        if not store.folder.is_dir():
            raise RuntimeError(f"{args.results} holds no record: nothing to report")
    else:
        trainings, where = _prepare(args, search, store, console)
        find = trainings.find
        steps = climb(search, find)
        while steps[-1].missing and done:
            title = f"Round {len(steps)} of {len(search.rounds)}: {len(steps[-1].trials)} settings"
            done = _train(title, steps[-1].attempts, trainings, where, console)
            steps = climb(search, find)
        best = winner(search, steps)
        if best is not None and args.confirm:
            one = declarations.declare(search, best, find, again=args.again)
            title = f"Confirmation {one.number} of {one.trial.name}, on the test side"
            done = _train(title, one.attempts(search), trainings, where, console)
    console.rule("Report")
    confirmations = [confirm(search, one, find) for one in declarations.all()]
    command = (
        f"python examples/miniature/search.py --preset {search.name}{' --confirm' * bool(confirmations)}"
    )
    path = report.write(search, steps, confirmations, args.report, find=find, command=command)
    console.print(str(path), highlight=False, soft_wrap=True)
    return 0 if done else 1


def _prepare(args: argparse.Namespace, search: Search, store: Any, console: Any) -> tuple[Any, Any]:
    from icons_data.load import load
    from miniature_paper import data
    from miniature_paper.runs import Workshop
    from miniature_paper.search.trainings import Trainings
    from miniature_paper.training import place_models

    where = machine(args.device, args.jobs)
    args.output.mkdir(parents=True, exist_ok=True)
    console.rule("Data")
    data.build_icons(args.icons)
    # All sizes of the grid's preset, though one is needed: so both commands share the pictures on the disk.
    tables = data.prepare(load(args.icons), args.output, search.grid.sizes, tracker(console))
    place_models(args.output)
    return Trainings(search, Workshop(args.output, args.icons, tables, store, where)), where


def _train(title: str, attempts: Sequence[Any], trainings: Any, where: Any, console: Any) -> bool:
    """Do what is missing and say whether nothing failed."""
    found = trainings.find(attempts)
    todo = [attempt for attempt in attempts if attempt not in found]
    console.rule(f"{title}, {where.jobs} at a time on {where.device}")
    console.print(f"{len(attempts)} trainings, {len(found)} of them there already", highlight=False)
    if not todo:
        return True
    known = [(attempt, sum(record["seconds"].values())) for attempt, record in found.items()]
    failed = run_on(console, todo, trainings.make, where.jobs, known)
    if failed:
        names = ", ".join(attempt.name for attempt in failed)
        console.print(f"Failed: {names}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return not failed


if __name__ == "__main__":
    # The trainer's dependencies warn about each other's ages; none of it concerns a reader.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.exit(main())
