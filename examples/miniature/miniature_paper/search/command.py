"""The command behind ``search.py``: do the rounds that are missing, confirm once, and write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples_common.terminal import say, status_of
from rich.console import Console

from miniature_paper.options import add_options, complete_options, prepare
from miniature_paper.records import Record, Store

from . import report
from .confirmation import Declarations, confirm
from .ladder import Find, climb, winner
from .trials import SEARCHES, Attempt, Search


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Search on the validation side for the setting in which RankCLIP's terms help most, "
        "by successive halving, and confirm the winner once on the test side. Finished trainings are kept, "
        "so an interrupted command is simply repeated.",
        allow_abbrev=False,
    )
    add_options(parser, tuple(SEARCHES))
    add = parser.add_argument
    add("--confirm", action="store_true", help="confirm the winner on the test side; possible once")
    add(
        "--again",
        action="store_true",
        help="with --confirm: confirm once more, with other seeds; the report says so",
    )
    args = parser.parse_args(argv)
    complete_options(parser, args, records="search")
    if args.again and not args.confirm:
        parser.error("argument --again: only with --confirm")
    if args.report_only and args.confirm:
        parser.error("argument --report-only: not with --confirm, which trains")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do the rounds that are missing, confirm the winner on request, and write the report."""
    args = parse(argv)
    return status_of(lambda console: _run(args, SEARCHES[args.preset], console))


def finished(results: Path) -> Find:
    """Return what finds records by their settings alone, for a report where the data need not be there.

    Raises:
        RuntimeError: If there is no record. What finds raises a ValueError if two records are of one setting,
            or one is damaged: a ladder on half of the records may lead elsewhere.
    """
    store = Store(results)
    if not store.path.is_file():
        raise RuntimeError(f"{results} holds no record: nothing to report")

    def find(attempts: Sequence[Attempt]) -> dict[Attempt, Record]:
        records, odd = store.of(attempts)
        if odd:
            raise ValueError("\n".join(odd))
        return {Attempt.of_record(record["setting"]): record for record in records}

    return find


def _run(args: argparse.Namespace, search: Search, console: Console) -> int:
    declarations = Declarations(args.results)
    done = True
    if args.report_only:
        find = finished(args.results)
        steps = climb(search, find)
    else:
        workshop = prepare(args, search.grid.sizes, console)
        find = workshop.find
        steps = climb(search, find)
        while steps[-1].missing and done:
            title = f"Round {len(steps)} of {len(search.rounds)}: {len(steps[-1].trials)} settings"
            done = workshop.do(title, steps[-1].attempts, console)
            steps = climb(search, find)
        best = winner(search, steps)
        if best is not None and args.confirm:
            one = declarations.declare(search, best, find, again=args.again)
            title = f"Confirmation {one.number} of {one.trial.name}, on the test side"
            done = workshop.do(title, one.attempts(search), console)
    console.rule("Report")
    confirmations = [confirm(search, one, find) for one in declarations.all()]
    confirmed = " --confirm" if confirmations else ""
    command = f"python examples/miniature/search.py --preset {search.name}{confirmed}"
    say(console, str(report.write(search, steps, confirmations, args.report, find=find, command=command)))
    return 0 if done else 1
