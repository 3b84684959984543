"""The command behind ``study.py``: train what is missing, and write the report."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from examples_common.records import Store
from examples_common.terminal import say, status_of
from rich.console import Console

from miniature_paper.options import add_options, complete_options, prepare

from . import report
from .confirmation import declare, needed, outcome
from .ladder import Find, progress
from .study import STUDIES, Study, load
from .teacher import prepare_teacher
from .trials import SIZE_NAMES, Attempt, teacher_folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="A comparison fixed before its first training: choose the best try of every arm on "
        "the validation side, confirm them once on the test side. Finished trainings are kept, so an "
        "interrupted command is simply repeated.",
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=STUDIES, help="which one")
    add_options(parser, SIZE_NAMES)
    args = parser.parse_args(argv)
    complete_options(parser, args, records=args.study)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing and write the report."""
    args = parse(argv)
    return status_of(lambda console: _run(args, load(args.study, args.preset), console))


def finished(results: Path) -> Find:
    """Return a function that finds records by their settings alone, so that a report needs no data.

    Raises:
        RuntimeError: If there is no record.
    """
    store = Store(results)
    if not store.path.is_file():
        raise RuntimeError(f"{results} holds no record: nothing to report")
    there = [Attempt.of_record(record["setting"]) for record in store.read().values()]
    records = dict(zip(dict.fromkeys(there), store.of(there), strict=True))
    return lambda attempts: {attempt: records[attempt] for attempt in attempts if attempt in records}


def _run(args: argparse.Namespace, study: Study, console: Console) -> int:
    done = True
    if args.report_only:
        find = finished(args.results)
        declare(study, progress(study, find).winners, args.results, record=False)
    else:
        workshop = prepare(args, study.grid.sizes, console)
        find = workshop.find
        if study.teacher is not None:
            workshop = dataclasses.replace(workshop, teacher=teacher_folder(study.teacher))
            there = progress(study, find)
            if there.due or outcome(study, there.winners, find) is None:
                done = prepare_teacher(study, workshop, console)
        while done and (now := progress(study, find)).due:
            done = workshop.do(f"{study.title}: a round on the validation side", now.due, console)
        if done:
            declare(now.study, now.winners, args.results, record=True)
            title = f"{study.title}: confirmation on the test side"
            done = workshop.do(title, needed(now.study, now.winners), console)
    console.rule("Report")
    command = f"python examples/miniature/study.py {study.name} --preset {study.size}"
    say(console, str(report.write(study, args.report, find=find, command=command)))
    return 0 if done else 1
