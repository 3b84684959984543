"""The one runner: from a study's plan to its missing trainings, its records and its report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from openmoji_demo.terminal import bars, say, status_of
from rich.console import Console

from . import STUDIES
from .manifest import FINISHED
from .manifest import commands as commands_of
from .plan import Find, MissingError, read
from .records import Record, Store, conditions, key_of
from .report import write

Finds = Mapping[str, Find]  # by data set


class DataSet(Protocol):
    """What a study's trainings are done on."""

    fingerprint: str | Callable[[Any], str]
    """Of all that a training's numbers depend on beside its setting; or a function of the setting."""

    def train(self, setting: Any) -> Record:
        """Train and measure a setting; return ``metrics`` and whatever else its record is to hold."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, as its folder declares it.

    Attributes:
        folder: Of its plan, records and report.
        setting: The class of its settings, a dataclass; ``arm``, ``side`` and ``seed`` are among what it has.
        records: The folders of records below ``results``, by data set.
        data: Returns the data sets that are there, given the sizes and the command's options.
        results: Returns the values of the report's template, given the sizes and the records of each data
            set. It asks for all trainings of the plan, and thereby decides which are done.
        plan: A file in the folder, see :func:`studies.plan.read`; or a function of the preset's name.
        report: The name of the report, without its ending.
        template: The report's template, in the folder; empty for one of the report's name.
        packages: Whose versions the records have.
        ask: Asks for all trainings of the plan, in their order, given the sizes and the records. With it the
            report is of the records that are there; without it ``results`` asks for all.
    """

    folder: Path
    setting: type
    records: Mapping[str, str]
    data: Callable[[SimpleNamespace, argparse.Namespace], Mapping[str, DataSet]]
    results: Callable[[SimpleNamespace, Finds], dict[str, Any]]
    plan: str | Callable[[str], SimpleNamespace]
    report: str
    template: str = ""
    packages: Sequence[str] = ("torch", "numpy", "scipy", "rankloss")
    ask: Callable[[SimpleNamespace, Finds], None] | None = None

    def sizes(self, preset: str) -> SimpleNamespace:
        """Return the plan in one of its sizes."""
        return read(self.folder / self.plan, preset) if isinstance(self.plan, str) else self.plan(preset)


def load(name: str) -> Study:
    """Return a study by its name."""
    study: Study = importlib.import_module(STUDIES[name]).study(name)
    return study


@dataclasses.dataclass(frozen=True)
class Run:
    """A study in one of its sizes.

    The full preset's records are part of the repository: trainings go on from them.
    """

    study: Study
    preset: str
    output: Path

    @property
    def home(self) -> Path:
        """The folder of records and report."""
        full = self.preset == "full"
        return self.study.folder if full else self.output / self.preset / self.study.folder.name

    @property
    def stores(self) -> dict[str, Store]:
        """The records of each data set."""
        folder = self.home / "results"
        return {name: Store(folder / below, self.study.setting) for name, below in self.study.records.items()}

    def finds(self, data: Mapping[str, DataSet] | None = None) -> dict[str, Find]:
        """Return the records that were made from these data; else all of them, where there are any."""
        stores = self.stores
        if data is None:
            return {name: Find(name, store.find()) for name, store in stores.items() if store.path.is_file()}
        return {name: Find(name, stores[name].find(_fingerprints(of))) for name, of in data.items()}

    def results(self, finds: Finds) -> dict[str, Any]:
        """Return the values of the report's template, given the records.

        Raises:
            RuntimeError: If there is no record.
            MissingError: If a training of the plan has none.
        """
        if not finds:
            raise RuntimeError(f"{self.home / 'results'} holds no record: nothing to report")
        return self.study.results(self.study.sizes(self.preset), finds)

    def train(self, data: Mapping[str, DataSet], console: Console) -> None:
        """Do the trainings that the plan asks for, until none is missing.

        Raises:
            MissingError: If a training is of a data set that is not there.
        """
        while True:
            finds = self.finds(data)
            try:
                if self.study.ask is None:
                    self.results(finds)
                else:
                    self.study.ask(self.study.sizes(self.preset), finds)
                return
            except MissingError as missing:
                if missing.data not in data:
                    raise
                self._do(missing, data[missing.data], console)

    def _do(self, missing: MissingError, data: DataSet, console: Console) -> None:
        """Do missing trainings of a data set, except those that another process does in the meantime."""
        store, fingerprint = self.stores[missing.data], _fingerprints(data)
        keys = {one: key_of(one, fingerprint(one)) for one in missing.settings}
        with bars(console) as progress:
            bar = progress.add_task(str(missing), total=len(keys))
            for setting in _shared({one: self.output / "locks" / f"{key}.lock" for one, key in keys.items()}):
                if setting not in store.find(fingerprint):  # another process may have finished it
                    say(console, keys[setting])
                    versions = conditions(self.study.packages, threads=torch.get_num_threads())
                    record = {"key": keys[setting], "setting": dataclasses.asdict(setting)}
                    found = {**data.train(setting), "data": fingerprint(setting), "conditions": versions}
                    store.save({**record, **found})
                progress.advance(bar)

    def write(self) -> Path:
        """Write the report, of all records there are.

        Raises:
            RuntimeError: If there is no record.
            MissingError: If a training is missing.
        """
        values = self.results(self.finds())
        template = self.study.folder / (self.study.template or f"{self.study.report}.md")
        return write(self.home / "report" / f"{self.study.report}.md", template, preset=self.preset, **values)


def _fingerprints(data: DataSet) -> Callable[[Any], str]:
    """Return the fingerprint of a data set as a function of the setting."""
    of = data.fingerprint
    return of if callable(of) else lambda _: of


def _shared(locks: Mapping[Any, Path]) -> Iterator[Any]:
    """Yield every setting while its lock is held; those that another process holds come last."""
    waiting = list(locks)
    while waiting:
        started = len(waiting)
        for setting in list(waiting):
            locks[setting].parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(locks[setting], timeout=0):
                    yield setting
            except Timeout:
                continue
            waiting.remove(setting)
        if len(waiting) == started:
            time.sleep(2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description="Do a study's missing trainings, and write its report. Finished trainings are kept: "
        "repeat an interrupted command; start it once more, and both processes share the work. Of a finished "
        "study the commands that repeat it are shown; without a name, the names.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", nargs="?", choices=[*STUDIES, *FINISHED], metavar="STUDY", help="its name")
    add("--seed", type=int, help="of a finished study: the seed that is repeated (default: all)")
    add("--preset", choices=("quick", "full"), default="quick", help="size (default: %(default)s)")
    add("--report-only", action="store_true", help="train nothing; report the records that are there")
    add("--data", type=Path, help="the folder of Flickr8k; features are kept in it, too")
    add("--icons", type=Path, default=Path("outputs/icons"), help="the icons; built there if missing")
    add(
        "--output", type=Path, default=Path("outputs/studies"), help="features, checkpoints, the quick preset"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing trainings and write the report; of a finished study show how it is repeated."""
    args = parse(argv)
    if args.study is None:
        print(f"living: {', '.join(STUDIES)}\nfinished: {', '.join(FINISHED)}")
        return 0
    if args.study in FINISHED:
        print(*commands_of(args.study, args.seed), sep="\n")
        return 0
    return status_of(lambda console: _run(args, console))


def _run(args: argparse.Namespace, console: Console) -> int:
    """Train, unless the report alone is asked for, write the report, and return the exit status."""
    run = Run(load(args.study), args.preset, args.output.resolve())
    if not args.report_only:
        torch.set_num_threads(1)
        if hasattr(os, "nice"):
            os.nice(5)
        args.output, args.icons = run.output, args.icons.resolve()
        run.train(run.study.data(run.study.sizes(args.preset), args), console)
    say(console, str(run.write()))
    return 0
