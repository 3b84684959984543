"""Writes the pictures and tables for trainers and evaluations, and the attributions."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from examples_common.page import fill
from examples_common.terminal import Track

from .draw import SIZE, pixels
from .labels import Labelled
from .package import PACKAGE, IconSet
from .records import Record
from .split import SIDES

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


def benchmark(
    folder: Path, records: Sequence[Record], pngs: Sequence[bytes], labelled: Sequence[Labelled], track: Track
) -> None:
    """Write retrieval and labelled sets in CLIP_benchmark's webdataset layout, a folder for each."""
    blocks = dict.fromkeys((record.shift, record.side) for record in records if record.retrieval)
    for shift, side in track(list(blocks), len(blocks), "Retrieval sets"):
        name = folder / f"retrieval{'-' + shift if shift else ''}"
        chosen = [r for r in records if r.retrieval and (r.shift, r.side) == (shift, side)]
        _split(name / side, [_sample(r, pngs, txt="\n".join(r.captions)) for r in chosen])
        (name / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")
    for one in track(labelled, len(labelled), "Labelled sets"):
        name = folder / one.name
        for side in SIDES:
            pairs = zip(one.index[side], one.label[side], strict=True)
            _split(name / side, [_sample(records[i], pngs, cls=str(label)) for i, label in pairs])
        (name / "classnames.txt").write_text("\n".join(one.classes) + "\n", encoding="utf-8")
        prompts = "\n".join(template.replace("{}", "{c}") for template in one.templates)
        (name / "zeroshot_classification_templates.txt").write_text(prompts + "\n", encoding="utf-8")


def _split(folder: Path, samples: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "0.tar"), **_TAR) as tar:
        for sample in samples:
            tar.write(sample)
    (folder / "nshards.txt").write_text("1\n", encoding="utf-8")


def _sample(record: Record, pngs: Sequence[bytes], **target: str) -> dict[str, Any]:
    texts = {kind: text.encode() for kind, text in target.items()}
    return {"__key__": f"{record.index:08d}", "png": pngs[record.index], **texts}


def _text(record: Record) -> str:
    return record.text if record.side == "train" else record.caption


def attributions(folder: Path, version: str, sets: Sequence[IconSet], records: Sequence[Record]) -> None:
    """Write the attributions that the licences require."""
    used = Counter(record.set for record in records)
    values = {"package": f"{PACKAGE} {version}", "size": SIZE, "sets": sets, "used": used}
    filters = {"number": "{:,}".format, "cell": lambda text: text.replace("|", "\\|")}
    text = fill(Path(__file__).with_name("attributions.md"), filters, **values)
    (folder / "ATTRIBUTIONS.md").write_text(text, encoding="utf-8")
