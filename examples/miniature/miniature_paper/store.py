"""The records: one JSON file for each trained and measured model, named by everything that determines it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .grid import PRESETS, Setting
from .training import arguments, model_config

Record = dict[str, Any]
MEASURES = 1  # to be raised whenever measure.py measures differently: older records are then made anew


def settings_digest(setting: Setting, data: str) -> str:
    """Return a fingerprint of all that determines a record: setting, architecture, arguments, data, measures.

    Args:
        setting: The setting.
        data: Fingerprint of the pairs trained on and of what is measured on.
    """
    preset = PRESETS[setting.preset]
    content = {
        "setting": dataclasses.asdict(setting),
        "model": model_config(setting.backbone),
        "arguments": arguments(setting),
        "data": data,
        "measured": {
            "version": MEASURES,
            "retrieval_items": preset.retrieval_items,
            "class_items": preset.class_items,
            "probe_items": preset.probe_items,
            "probe_strengths": preset.probe_strengths,
            "umap_pairs": preset.umap_pairs,
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def key_of(setting: Setting, data: str) -> str:
    """Return the name of a setting's record, without the suffix."""
    return f"{setting.name}-{settings_digest(setting, data)}"


class Store:
    """A folder of records.

    Args:
        folder: Where they are; it is made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Return where the record of this name is."""
        return self.folder / f"{key}.json"

    def load(self, key: str) -> Record | None:
        """Return a record, or None if there is none or its file is damaged.

        A damaged one, of a full disk for instance, is trained anew.
        """
        try:
            return _read(self.path(key))
        except (OSError, ValueError):
            return None

    def save(self, key: str, record: Record) -> None:
        """Write a record, whole or not at all."""
        write_whole(self.path(key), record)

    def of(self, settings: Iterable[Any]) -> tuple[list[Record], list[str]]:
        """Return the records of these settings, whatever data they were made from, and what is odd.

        This is what a report is made of where the data need not be there. Two records of one setting were
        made from different data or by different arguments: the report would mix them, so both are left out.
        """
        wanted = {json.dumps(dataclasses.asdict(s), sort_keys=True): s for s in settings}
        found: dict[str, list[tuple[Path, Record]]] = {}
        odd = []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            try:
                record = _read(path)
            except (OSError, ValueError) as error:
                odd.append(f"{path.name} is damaged and left out: {error}")
                continue
            key = json.dumps(record["setting"], sort_keys=True)
            if key in wanted:
                found.setdefault(key, []).append((path, record))
        for same in found.values():
            if len(same) > 1:
                names = " and ".join(path.name for path, _ in same)
                odd.append(
                    f"{names} are of one setting, so both are left out: delete those that are outdated"
                )
        return [same[0][1] for key in wanted if len(same := found.get(key, [])) == 1], odd


def write_whole(path: Path, content: Any) -> None:
    """Write JSON that is either there as a whole or not at all, whatever interrupts it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".partial-", suffix=".json", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _read(path: Path) -> Record:
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not {"setting", "metrics", "chance", "items"} <= record.keys():
        raise ValueError("not a record")
    return record
