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


def read_lines(path: Path) -> tuple[list[Record], list[str]]:
    """Return a file's lines, and a sentence for each that is damaged.

    A last line without its end is one that is being written, or whose writer was killed: it is ignored.
    """
    if not path.is_file():
        return [], []
    lines, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("not an object")
        except ValueError as error:
            damaged.append(f"{path.name}, line {number}, is damaged and left out: {error}")
        else:
            lines.append(content)
    return lines, damaged


def append_lines(path: Path, new: Callable[[list[Record]], Iterable[Record]]) -> None:
    """Append what ``new`` returns, given the lines that are there; no other process writes in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        text = "".join(
            json.dumps(line, ensure_ascii=False, separators=(",", ":"), sort_keys=True) + "\n"
            for line in new(read_lines(path)[0])
        )
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # half a line of a writer that was killed
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


class Store:
    """The records in a folder's ``records.jsonl``, by their keys."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"

    def load(self, key: str) -> Record | None:
        """Return a record, or None if there is none."""
        return self.read()[0].get(key)

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

    def of(self, settings: Iterable[Any]) -> tuple[list[Record], list[str]]:
        """Return the records of these settings, whatever data they were made from, and what is odd.

        A report is made of these, so the data need not be there. Two records of one setting were made from
        different data or by different arguments; a report would mix them, so both are left out.
        """
        records, damaged = self.read()
        found, odd, keys = [], list(damaged), defaultdict[str, list[str]](list)
        for key, record in records.items():
            keys[_text(record["setting"])].append(key)
        for wanted in dict.fromkeys(_text(dataclasses.asdict(setting)) for setting in settings):
            same = keys[wanted]
            if len(same) == 1:
                found.append(records[same[0]])
            elif same:
                odd.append(f"{' and '.join(same)} are of one setting and left out: delete the outdated line")
        return found, odd

    def read(self) -> tuple[dict[str, Record], list[str]]:
        """Return all records by their keys, and a sentence for each line that is damaged."""
        lines, damaged = read_lines(self.path)
        conditions = {one["conditions_id"]: one["conditions"] for one in lines if "conditions_id" in one}
        records: dict[str, Record] = {}
        for line in lines:
            if "conditions_id" in line:
                continue
            if not line.keys() >= _REQUIRED or line.get("conditions") not in conditions:
                damaged.append(f"{self.path.name}: {line.get('key', 'a line')} is no record and left out")
                continue
            record = {**line, "conditions": conditions[line["conditions"]]}
            records.setdefault(record.pop("key"), record)
        return records, damaged


def _text(content: Record) -> str:
    return json.dumps(content, sort_keys=True)
