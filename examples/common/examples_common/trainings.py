"""Trainings that leave records: each is done once, and found again by its setting."""

import dataclasses
import hashlib
import itertools
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from rich.console import Console

from .records import Record, Store
from .terminal import bars, say

Setting = TypeVar("Setting")


class Trainings(ABC):
    """The trainings of a data set, by their settings: dataclasses with an arm, a side and a seed."""

    store: Store
    locks: Path | None = None  # the folder of locks, where several processes share the trainings

    @property
    @abstractmethod
    def data(self) -> str:
        """Fingerprint of the data."""

    @abstractmethod
    def record(self, setting: Any) -> Record:
        """Train and measure a setting, and return its record."""

    def key(self, setting: Any) -> str:
        """Return the key of a setting's record: it names all that the numbers depend on."""
        content = json.dumps([dataclasses.asdict(setting), self.data], sort_keys=True)
        name = f"{re.sub('[ ,]+', '-', setting.arm)}-{setting.side}-seed{setting.seed}"
        return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def find(self, settings: Iterable[Any]) -> dict[Any, Record]:
        """Return the records there are of these settings, from these data."""
        records = self.store.read()
        return {one: records[key] for one in settings if (key := self.key(one)) in records}

    def do(self, title: str, settings: Sequence[Any], console: Console) -> None:
        """Train and measure the settings without a record."""
        there = self.find(settings)
        say(console, f"{title}: {len(settings)} trainings, {len(there)} of them finished already")
        with bars(console) as progress:
            bar = progress.add_task(title, total=len(settings), completed=len(there))
            waiting = [one for one in settings if one not in there]
            for setting in shared(waiting, self.key, self.locks) if self.locks else waiting:
                if not self.find([setting]):  # another process may have finished it
                    self.store.save(self.key(setting), self.record(setting))
                progress.advance(bar)


def shared(settings: Iterable[Setting], key: Callable[[Setting], str], locks: Path) -> Iterator[Setting]:
    """Yield every setting while its lock is held; those that another process holds come last."""
    locks.mkdir(parents=True, exist_ok=True)
    waiting = list(settings)
    while waiting:
        started = len(waiting)
        for setting in list(waiting):
            try:
                with FileLock(locks / f"{key(setting)}.lock", timeout=0):
                    yield setting
            except Timeout:
                continue
            waiting.remove(setting)
        if len(waiting) == started:
            time.sleep(2)


def finder(store: Store, kind: Callable[..., Any]) -> Callable[[Iterable[Any]], Mapping[Any, Record]]:
    """Return a function that finds records by their settings alone, so that a report needs no data.

    Raises:
        ValueError: If two records are of one setting.
    """
    settings = [kind(**record["setting"]) for record in store.read().values()]
    records = dict(zip(dict.fromkeys(settings), store.of(settings), strict=True))
    return lambda wanted: {one: records[one] for one in wanted if one in records}


def best(scores: Mapping[Setting, float | None]) -> Setting | None:
    """Return the setting with the largest score, the first of equal ones; None until all scores are there."""
    known = {one: score for one, score in scores.items() if score is not None}
    return max(known, key=known.__getitem__) if known and len(known) == len(scores) else None


def by_seed(arms: Iterable[Iterable[Any]]) -> list[Any]:
    """Return the settings of all arms, seed by seed."""
    return sorted(itertools.chain.from_iterable(arms), key=lambda one: one.seed)
