"""One training of the search, from the trainer to its record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from miniature_paper.data import Tables
from miniature_paper.runs import Machine, measured_by
from miniature_paper.schedule import Progress
from miniature_paper.store import Record, Store
from miniature_paper.training import model_config, model_name, train

from .measuring import VERSION
from .trials import Attempt, Search


def key_of(attempt: Attempt, search: Search, data: str) -> str:
    """Return the name of a record: the attempt's, with a fingerprint of all that determines its content."""
    content = {
        "setting": dataclasses.asdict(attempt),
        "model": model_config(attempt.backbone),
        "arguments": attempt.job().arguments,
        "data": data,
        "measured": {
            "version": VERSION,
            "retrieval_items": search.grid.retrieval_items,
            "class_items": search.grid.class_items,
        },
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    return f"{attempt.name}-{digest}"


class Trainings:
    """Makes records of attempts.

    Args:
        search: The search.
        output: The folder that the trainer is started in.
        icons: The icons' folder.
        tables: The tables of pairs below ``output``.
        store: Where records go.
        machine: What to run on.
    """

    def __init__(
        self, search: Search, *, output: Path, icons: Path, tables: Tables, store: Store, machine: Machine
    ) -> None:
        self._search = search
        self._output = output
        self._icons = icons
        self._tables = tables
        self._store = store
        self._machine = machine

    def find(self, attempts: Sequence[Attempt]) -> dict[Attempt, Record]:
        """Return the records that there are of the same data and arguments."""
        loaded = {attempt: self._store.load(self._key(attempt)) for attempt in attempts}
        return {attempt: record for attempt, record in loaded.items() if record is not None}

    async def make(self, attempt: Attempt, progress: Progress) -> None:
        """Train and measure, and store the record.

        Raises:
            TrainingError: If the trainer failed, or trained another loss.
            MeasuringError: If measuring failed.
        """
        key, machine = self._key(attempt), self._machine
        folder = self._output / "runs" / key
        progress("training", 0.0)
        trained = await train(
            attempt.job(),
            output=self._output,
            table=self._tables.tables[attempt.pairs],
            name=key,
            device=machine.device,
            workers=machine.workers,
            threads=machine.threads,
            progress=lambda share: progress("training", share),
        )
        progress("measuring", 1.0)
        started = time.monotonic()
        todo = {
            "setting": dataclasses.asdict(attempt),
            "output": str(self._output),
            "model": model_name(attempt.backbone),
            "checkpoint": str(trained.checkpoint),
            "icons": str(self._icons),
            "device": machine.device,
        }
        measured = await measured_by(
            "miniature_paper.search.measuring", todo, folder, threads=machine.threads
        )
        record = {
            "setting": dataclasses.asdict(attempt),
            **measured,
            "data": self._tables.digests[attempt.pairs],
            "seconds": {
                "training": round(trained.seconds, 1),
                "measuring": round(time.monotonic() - started, 1),
            },
            "conditions": machine.conditions(),
        }
        self._store.save(key, record)
        shutil.rmtree(folder)

    def _key(self, attempt: Attempt) -> str:
        return key_of(attempt, self._search, self._tables.digests[attempt.pairs])


def stored(store: Store, attempts: Sequence[Attempt]) -> dict[Attempt, Record]:
    """Return records by their settings alone: what a report is made of where the data need not be there.

    Raises:
        ValueError: If two are of one setting, or one is damaged: a ladder on half of the records may lead
            elsewhere.
    """
    records, odd = store.of(attempts)
    if odd:
        raise ValueError("\n".join(odd))
    return {Attempt.of_record(record["setting"]): record for record in records}
