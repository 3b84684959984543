"""Reads what an offline run of W&B stored, since the package no longer reads its own files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

_BLOCK = 2**15
_FIRST, _LAST = {1, 2}, {1, 4}  # a record is of type 1, or in pieces of types 2, 3…, 4


def wandb_scalars(directory: Path, name: str) -> dict[str, dict[int, float]]:
    """The history of the one offline run of that name below ``directory``: key → step → value."""
    (path,) = directory.glob(f"wandb/offline-run-*/run-{name}.wandb")
    scalars: dict[str, dict[int, float]] = {}
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            for key, value in row.items():
                scalars.setdefault(key, {})[int(row["_step"])] = value
    return scalars


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, which follows a header of seven bytes."""
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:  # a block's rest is too short for a header
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        record = piece if kind in _FIRST else record + piece
        if kind in _LAST:
            yield record
        position += 7 + length
