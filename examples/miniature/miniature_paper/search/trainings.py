"""One training of the search, from the trainer to its record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from miniature_paper.runs import Workshop
from miniature_paper.schedule import Progress
from miniature_paper.store import Record, Store
from miniature_paper.training import model_config

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
        workshop: Where they are made.
    """

    def __init__(self, search: Search, workshop: Workshop) -> None:
        self._search = search
        self._workshop = workshop

    def find(self, attempts: Sequence[Attempt]) -> dict[Attempt, Record]:
        """Return the records that there are of the same data and arguments."""
        loaded = {attempt: self._workshop.store.load(self._key(attempt)) for attempt in attempts}
        return {attempt: record for attempt, record in loaded.items() if record is not None}

    async def make(self, attempt: Attempt, progress: Progress) -> None:
        """Train and measure, and store the record; see :meth:`Workshop.make`."""
        await self._workshop.make(
            attempt,
            attempt.job(),
            self._key(attempt),
            measured_by="miniature_paper.search.measuring",
            progress=progress,
        )

    def _key(self, attempt: Attempt) -> str:
        return key_of(attempt, self._search, self._workshop.tables.digests[attempt.pairs])


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
