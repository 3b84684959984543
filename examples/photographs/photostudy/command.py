"""The command: check the folder, compute features, do the missing trainings, write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples_common.records import Store
from examples_common.statistics import Difference
from examples_common.study_command import home, study_parser
from examples_common.terminal import say, status_of, tracker
from examples_common.trainings import finder
from icons_data.load import load
from miniature_paper.data import build_icons
from rich.console import Console

from . import drawings, plan, report, students, taught
from .features import BLOCK, Cache, Encoders, FrozenEncoders
from .folder import WHERE, Photographs, read
from .heads import Setting
from .plan import Find, Plan
from .study import Study

_EXAMPLE = Path(__file__).resolve().parents[1]
_SECONDS_OF_A_BLOCK = {FrozenEncoders: 24, students.data.Thumbnails: 2}  # of one core


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = study_parser(
        "RankCLIP and plain CLIP on Flickr8k, by a registered plan. Finished trainings are kept: "
        "repeat an interrupted command; start it a second time, and both processes share the work.",
        plan.PLANS,
        "outputs/photographs",
        "the quick preset",
    )
    parser.add_argument("--data", type=Path, help="the folder of Flickr8k; features are kept in it, too")
    parser.add_argument(
        "--icons",
        type=Path,
        default=Path("outputs/icons"),
        help="folder of the icons, built if missing: part 2c",
    )
    parts = ("1", "2a", "2c", *taught.plan.PLANS)
    parser.add_argument("--part", choices=parts, default="1", help="of the study (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.data is None and not args.report_only and args.part != "2c":
        parser.error(f"argument --data: needed\n{WHERE}")
    folder = home(args, _EXAMPLE)
    args.results, args.report = folder / "results", folder / "report"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing trainings and write the report."""
    args = parse(argv)
    run = {"1": _heads, "2a": _students, "2c": _drawings}.get(args.part, _taught)
    return status_of(lambda console: run(args, console))


def _heads(args: argparse.Namespace, console: Console) -> int:
    store, sizes = _store(args, "1"), plan.PLANS[args.preset]
    if not args.report_only:
        study = prepare(args.data, store, sizes, console)
        train(study, sizes, console)
    say(console, str(report.write(sizes, finished(store), args.report)))
    return 0


def _students(args: argparse.Namespace, console: Console) -> int:
    store, sizes = _store(args, "2a"), students.plan.PLANS[args.preset]
    if not args.report_only:
        of_photographs(args.data, store, sizes, console).follow(sizes, console)
    find = finished(store, students.train.Setting)
    say(console, str(students.report.write(sizes, find, args.report, _planned_of_2b(args))))
    return 0


def _taught(args: argparse.Namespace, console: Console) -> int:
    store, sizes = _store(args, args.part), taught.plan.PLANS[args.part][args.preset]
    search = _search_of_heads(args, sizes)
    if search.due:
        raise RuntimeError(f"{_store(args, '1').path}: part 1's search of clip is not finished: --part 1")
    if not args.report_only:
        of = prepare(args.data, store, sizes.heads, console)
        taught.study.Study(of, sizes, search.chosen, store).follow(console)
    others = {} if args.part == "3" else _planned_of_2a(args)
    find = finished(store, taught.plan.Setting)
    say(console, str(taught.report.write(sizes, search, find, args.report, others)))
    return 0


def _drawings(args: argparse.Namespace, console: Console) -> int:
    sizes, names = drawings.plan.PLANS[args.preset], drawings.plan.SETS
    stores = {name: Store(args.results / name) for name in names}
    if not args.report_only:
        kept = args.output / "drawings"
        build_icons(args.icons)
        sides = {
            "emojis": drawings.data.emojis(sizes.emojis),
            "icons": drawings.data.icons(load(args.icons), *sizes.icons),
        }
        sets = {name: drawings.data.data_set(name, sides[name], kept, FrozenEncoders) for name in names}
        studies = {name: students.study.Study(sets[name], stores[name]) for name in names}
        drawings.study.follow(sizes, studies, console)
    finds = {name: finished(store, students.train.Setting) for name, store in stores.items()}
    say(console, str(drawings.report.write(sizes, finds, args.report, _differences_of_2a(args))))
    return 0


def _store(args: argparse.Namespace, part: str) -> Store:
    return Store(args.results / f"part{part}")


def _known(args: argparse.Namespace, part: str, kind: type) -> Find:
    """Return a function that finds the records of another part; nothing where it has none."""
    return finder(_store(args, part), kind)


def _search_of_heads(args: argparse.Namespace, sizes: taught.plan.Plan) -> plan.Search:
    return taught.plan.of_heads(sizes, _known(args, "1", Setting))


def _planned_of_2a(args: argparse.Namespace) -> dict[students.findings.Key, Difference]:
    """Return part 2a's planned tests, which are in one correction with part 2b's."""
    find = _known(args, "2a", students.train.Setting)
    return students.findings.findings(students.plan.PLANS[args.preset], find, {}).planned


def _differences_of_2a(args: argparse.Namespace) -> dict[str, Difference | None]:
    """Return part 2a's differences to plain CLIP in R@10, by arm."""
    find = _known(args, "2a", students.train.Setting)
    found = students.findings.findings(students.plan.PLANS[args.preset], find, _planned_of_2b(args))
    return {arm: found.difference((arm, students.plan.CLIP)) for arm in students.plan.GRIDS}


def _planned_of_2b(args: argparse.Namespace) -> dict[students.findings.Key, Difference]:
    """Return part 2b's planned tests, which are in one correction with part 2a's."""
    sizes = taught.plan.PLANS["2b"][args.preset]
    find = _known(args, "2b", taught.plan.Setting)
    return taught.findings.findings(sizes, _search_of_heads(args, sizes), find, {}).planned


def of_photographs(
    folder: Path, store: Store, sizes: students.plan.Plan, console: Console
) -> students.study.Study:
    """Check the folder, compute pixels and features that are missing, and return part 2a's study."""
    photographs = read(folder)
    pictures = students.train.Setting("clip", 0, "dev", **sizes.start).train_pictures
    features, pixels = (cached(photographs, pictures, console, kind) for kind in _SECONDS_OF_A_BLOCK)
    return students.study.Study(students.data.of_photographs(pixels, features, pictures), store)


def finished(store: Store, kind: type = Setting) -> Find:
    """Return a function that finds records by their settings alone, so that a report needs no data.

    Raises:
        RuntimeError: If there is no record.
        ValueError: If two records are of one setting.
    """
    if not store.path.is_file():
        raise RuntimeError(f"{store.path}: holds no record: nothing to report")
    return finder(store, kind)


def prepare(folder: Path, store: Store, sizes: Plan, console: Console) -> Study:
    """Check the folder and compute the features that are missing."""
    photographs = read(folder)
    pictures = Setting("clip", 0, "dev", **sizes.start).train_pictures
    return Study(photographs, cached(photographs, pictures, console), store, pictures)


def cached(
    photographs: Photographs, train_pictures: int, console: Console, kind: type[Encoders] = FrozenEncoders
) -> Cache:
    """Return the features of the pictures that are used; those that are missing are computed."""
    cache = Cache(photographs, kind.name)
    missing = cache.missing(photographs.used(train_pictures).values())
    cost = f"about {_SECONDS_OF_A_BLOCK[kind] * len(missing) / 60:.0f} minutes of one core"
    say(console, f"{cache.encoders}: {len(missing)} blocks of {BLOCK} pictures are missing; {cost}")
    if missing:
        encoders = kind()
        for path, names in tracker(console)(missing, len(missing), "Features"):
            cache.fill(path, names, encoders)
    return cache


def train(study: Study, sizes: Plan, console: Console) -> None:
    """Follow the plan: CLIP's search, both losses in its setting, RankCLIP's search, the other arms."""
    of_clip = search(study, sizes, "clip", console)
    unknown = plan.search(sizes, "rankclip", lambda _: {})
    first = plan.arms(sizes, of_clip, unknown, study.find)
    both = {name: first[name] for name in plan.TUNED}
    study.do("Test side, in CLIP's best setting", plan.in_order(both), console)
    of_rankclip = search(study, sizes, "rankclip", console)
    arms = plan.arms(sizes, of_clip, of_rankclip, study.find)
    study.do("Test side", plan.in_order(arms), console)


def search(study: Study, sizes: Plan, loss: str, console: Console) -> plan.Search:
    """Do a search on the dev side, and return it."""
    while (found := plan.search(sizes, loss, study.find)).due:
        study.do(f"Search of {loss} on the dev side", found.due, console)
    return found
