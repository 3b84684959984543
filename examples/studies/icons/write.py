"""Writes the pictures and tables for trainers and evaluations, and the attributions."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from openmoji_demo.page import fill
from openmoji_demo.terminal import Track

from .draw import SIZE, pixels
from .labels import Labelled
from .package import PACKAGE, IconSet
from .records import Record

SHARD = 10_000  # samples in a shard
# A fixed time and owner make builds reproducible byte for byte.
_TAR = {"encoder": False, "mtime": 0, "user": "", "group": ""}


def images(path: Path, pngs: Sequence[bytes], track: Track) -> None:
    """Write all pictures as one array that can be mapped into memory."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(pngs), SIZE, SIZE, 3))
    for number, png in enumerate(track(pngs, len(pngs), "Writing the array")):
        array[number] = pixels(png)
    array.flush()


def labels(folder: Path, labelled: Sequence[Labelled]) -> None:
    """Write each labelled set as JSON."""
    folder.mkdir()
    for one in labelled:
        (folder / f"{one.name}.json").write_text(json.dumps(vars(one)) + "\n", encoding="utf-8")


def shards(folder: Path, sides: Mapping[str, Sequence[Record]], pngs: Sequence[bytes], track: Track) -> None:
    """Write the trained sets' sides as webdataset shards of PNGs and texts, such as ``train-0000.tar``."""
    folder.mkdir()
    for side, records in sides.items():
        names = str(folder / f"{side}-%04d.tar")
        with webdataset.ShardWriter(names, maxcount=SHARD, maxsize=math.inf, verbose=0, **_TAR) as writer:
            for record in track(records, len(records), f"Shards: {side}"):
                writer.write(_sample(record, pngs, txt=_text(record)))


def _sample(record: Record, pngs: Sequence[bytes], **target: str) -> dict[str, Any]:
    """Return a webdataset sample: a picture, and texts by the extensions of their files."""
    texts = {kind: text.encode() for kind, text in target.items()}
    return {"__key__": f"{record.index:08d}", "png": pngs[record.index], **texts}


def _text(record: Record) -> str:
    """Return the text of a picture to train on, and the caption of a held-out one."""
    return record.text if record.side == "train" else record.caption


def attributions(folder: Path, version: str, sets: Sequence[IconSet], records: Sequence[Record]) -> None:
    """Write the attributions that the licences require."""
    used = Counter(record.set for record in records)
    values = {"package": f"{PACKAGE} {version}", "size": SIZE, "sets": sets, "used": used}
    filters = {"number": "{:,}".format, "cell": lambda text: text.replace("|", "\\|")}
    text = fill(Path(__file__).with_name("attributions.md"), filters, **values)
    (folder / "ATTRIBUTIONS.md").write_text(text, encoding="utf-8")
