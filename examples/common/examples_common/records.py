"""Records of finished runs: one JSON line each, in a file that several processes may append to.

Versions and hardware are the same for many records, so each such set of conditions has a line of its own, and
a record names it.
"""

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

Record = dict[str, Any]
_REQUIRED = {"key", "setting", "metrics", "chance", "items"}


def read_lines(path: Path) -> list[Record]:
    """Return a file's lines.

    A last line without its end is one that is being written, or whose writer was killed: it is ignored.

    Raises:
        ValueError: If another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}): delete it") from error
    return found


def append_lines(path: Path, new: Callable[[list[Record]], Iterable[Record]]) -> None:
    """Append what ``new`` returns, given the lines that are there; no other process writes in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        text = "".join(
            json.dumps(line, ensure_ascii=False, separators=(",", ":"), sort_keys=True) + "\n"
            for line in new(read_lines(path))
        )
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # drop the partial line of a writer that was killed
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


class Store:
    """The records in a folder's ``records.jsonl``, by their keys."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"

    def save(self, key: str, record: Record) -> None:
        """Append a record, unless another process has finished the same run in the meantime."""
        conditions = record.get("conditions", {})
        name = hashlib.sha256(_text(conditions).encode()).hexdigest()[:8]

        def new(lines: list[Record]) -> Iterable[Record]:
            if any(line.get("key") == key for line in lines):
                return
            if not any(line.get("conditions_id") == name for line in lines):
                yield {"conditions_id": name, "conditions": conditions}
            yield {**record, "key": key, "conditions": name}

        append_lines(self.path, new)

    def of(self, settings: Iterable[Any]) -> list[Record]:
        """Return the records there are of these settings, whatever data they were made from.

        A report is made of these, so the data need not be there.

        Raises:
            ValueError: If two records are of one setting: they were made from different data or by different
                arguments, and a report would mix them.
        """
        found, same = [], defaultdict[str, dict[str, Record]](dict)
        for key, record in self.read().items():
            same[_text(record["setting"])][key] = record
        for wanted in dict.fromkeys(_text(dataclasses.asdict(setting)) for setting in settings):
            if len(same[wanted]) > 1:
                keys = " and ".join(same[wanted])
                raise ValueError(f"{self.path}: {keys} are of one setting: delete the outdated line")
            found += same[wanted].values()
        return found

    def read(self) -> dict[str, Record]:
        """Return all records by their keys; of two with one key, the first."""
        lines = read_lines(self.path)
        conditions = {one["conditions_id"]: one["conditions"] for one in lines if "conditions_id" in one}
        records: dict[str, Record] = {}
        for line in (line for line in lines if "conditions_id" not in line):
            if not line.keys() >= _REQUIRED or line.get("conditions") not in conditions:
                raise ValueError(f"{self.path}: {line.get('key', 'a line')} is no record: delete it")
            record = {**line, "conditions": conditions[line["conditions"]]}
            records.setdefault(record.pop("key"), record)
        return records


def _text(content: Record) -> str:
    return json.dumps(content, sort_keys=True)
