"""Records of finished trainings: one JSON line each, in a file that several processes may append to.

Versions and hardware are the same for many records, so each such set of conditions has a line of its own, and
a record names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

Record = dict[str, Any]
_REQUIRED = {"key", "setting", "metrics", "data"}


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
    """The records in a folder's ``records.jsonl``, whose settings are of one dataclass."""

    def __init__(self, folder: Path, kind: type) -> None:
        self.path, self.kind = folder / "records.jsonl", kind

    def save(self, record: Record) -> None:
        """Append a record, unless another process has finished the same training in the meantime."""
        conditions = record.get("conditions", {})
        name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:8]
        setting = json.loads(json.dumps(record["setting"]))

        def new(lines: list[Record]) -> Iterable[Record]:
            same = {"setting": setting, "data": record["data"]}
            if any(same.items() <= line.items() for line in lines):
                return
            if not any(line.get("conditions_id") == name for line in lines):
                yield {"conditions_id": name, "conditions": conditions}
            yield {**record, "conditions": name}

        append_lines(self.path, new)

    def find(self, data: Callable[[Any], str] | None = None) -> dict[Any, Record]:
        """Return the records by their settings.

        Args:
            data: Returns the fingerprint of a setting's data; records of other data are left out. None: the
                records of all data.

        Raises:
            ValueError: If a line is no record; if two are of one setting, which a report would mix.
        """
        lines = read_lines(self.path)
        conditions = {one["conditions_id"]: one["conditions"] for one in lines if "conditions_id" in one}
        records: dict[Any, Record] = {}
        for line in (line for line in lines if "conditions_id" not in line):
            if not line.keys() >= _REQUIRED or line.get("conditions") not in conditions:
                raise ValueError(f"{self.path}: {line.get('key', 'a line')} is no record: delete it")
            setting = self.kind(**{name: _frozen(value) for name, value in line["setting"].items()})
            if data is not None and data(setting) != line["data"]:
                continue
            if setting in records:
                keys = f"{records[setting]['key']} and {line['key']}"
                raise ValueError(f"{self.path}: {keys} are of one setting: delete the outdated line")
            records[setting] = {**line, "conditions": conditions[line["conditions"]]}
        return records


def _frozen(value: Any) -> Any:
    """Return a value of JSON with tuples in place of lists, so that settings can be keys."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def key_of(setting: Any, data: str) -> str:
    """Return the key of a record: a readable name, and a hash of the setting and of the data."""
    content = json.dumps([dataclasses.asdict(setting), data], sort_keys=True)
    name = re.sub("[ ,]+", "-", f"{setting.arm}-{setting.side}-seed{setting.seed}")
    return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def conditions(packages: Iterable[str], **more: Any) -> dict[str, Any]:
    """Return the versions of packages, the processor, and ``more``."""
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        **more,
    }


def _cpu() -> str:
    """Return the processor's name: of Linux's file, where there is one, else as Python has it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
