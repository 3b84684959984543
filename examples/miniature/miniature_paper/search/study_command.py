"""The command behind ``study.py``: do the trainings that are missing, and report what may be said."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from examples_common.terminal import say, status_of
from rich.console import Console

from miniature_paper.options import add_options, complete_options, prepare

from . import study_report
from .command import finished
from .study import SIZE_NAMES, STUDIES, Study, declare, load, needed, standing, teacher_folder
from .teacher import prepare_teacher


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


def _run(args: argparse.Namespace, study: Study, console: Console) -> int:
    done = True
    if args.report_only:
        find = finished(args.results)
    else:
        workshop = prepare(args, study.grid.sizes, console)
        if study.teacher is not None:
            workshop = dataclasses.replace(workshop, teacher=teacher_folder(study.teacher))
            done = prepare_teacher(study, workshop, console)
        find = workshop.find
        while done and (due := standing(study, find).due):
            done = workshop.do(f"{study.title} Selection of a try for every arm", due, console)
        if done:
            winners = declare(study, standing(study, find), args.results, find)
            title = f"{study.title} Confirmation on the test side"
            done = workshop.do(title, needed(study, winners), console)
    console.rule("Report")
    command = f"python examples/miniature/study.py {study.name} --preset {study.size}"
    say(console, str(study_report.write(study, args.report, find=find, command=command)))
    return 0 if done else 1
