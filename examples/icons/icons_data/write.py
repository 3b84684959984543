"""Writes the pictures and tables that trainers and evaluations read."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import webdataset
from examples_common.terminal import Track

from .draw import SIZE, pixels
from .labels import TEMPLATES, Labelled
from .records import Record
from .split import SIDES

SHARD = 10_000  # samples in a shard
_FOLDER = 1_000  # files in a folder


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
        content = {
            "name": one.name,
            "shift": one.shift,
            "classes": one.classes,
            "templates": TEMPLATES,
            "index": one.index,
            "label": one.label,
        }
        (folder / f"{one.name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def shards(
    folder: Path,
    records: Sequence[Record],
    pngs: Sequence[bytes],
    ranges: Mapping[str, tuple[int, int]],
    track: Track,
) -> None:
    """Write the trained sets' sides as webdataset shards of PNGs and texts, such as ``train-0000.tar``."""
    folder.mkdir()
    for side in SIDES:
        start, stop = ranges.get(side, (0, 0))
        for number, first in enumerate(
            track(range(start, stop, SHARD), -(-(stop - start) // SHARD), f"Shards: {side}")
        ):
            with _tar(folder / f"{side}-{number:04d}.tar") as tar:
                for record in records[first : min(first + SHARD, stop)]:
                    text = record.text if side == "train" else record.caption
                    tar.write(
                        {"__key__": f"{record.index:08d}", "png": pngs[record.index], "txt": text.encode()}
                    )


def benchmark(
    folder: Path, records: Sequence[Record], pngs: Sequence[bytes], labelled: Sequence[Labelled], track: Track
) -> None:
    """Write retrieval and labelled sets in CLIP_benchmark's webdataset layout, a folder for each."""
    blocks = dict.fromkeys((record.shift, record.side) for record in records if record.retrieval)
    for shift, side in track(list(blocks), len(blocks), "Retrieval sets"):
        name = folder / f"retrieval{'-' + shift if shift else ''}"
        chosen = [r for r in records if r.retrieval and (r.shift, r.side) == (shift, side)]
        _split(name, side, [(r, {"txt": "\n".join(r.captions).encode()}) for r in chosen], pngs)
        (name / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")
    for one in track(labelled, len(labelled), "Labelled sets"):
        name = folder / one.name
        for side in SIDES:
            pairs = zip(one.index[side], one.label[side], strict=True)
            _split(name, side, [(records[i], {"cls": str(label).encode()}) for i, label in pairs], pngs)
        (name / "classnames.txt").write_text("\n".join(one.classes) + "\n", encoding="utf-8")
        prompts = "\n".join(template.replace("{}", "{c}") for template in TEMPLATES)
        (name / "zeroshot_classification_templates.txt").write_text(prompts + "\n", encoding="utf-8")


def _split(
    folder: Path, side: str, samples: Sequence[tuple[Record, dict[str, bytes]]], pngs: Sequence[bytes]
) -> None:
    (folder / side).mkdir(parents=True)
    with _tar(folder / side / "0.tar") as tar:
        for record, target in samples:
            tar.write({"__key__": f"{record.index:08d}", "png": pngs[record.index], **target})
    (folder / side / "nshards.txt").write_text("1\n", encoding="utf-8")


def _tar(path: Path) -> webdataset.TarWriter:
    # A fixed time and owner make builds reproducible byte for byte.
    return webdataset.TarWriter(str(path), encoder=False, mtime=0, user="", group="")


def files(
    folder: Path,
    records: Sequence[Record],
    pngs: Sequence[bytes],
    ranges: Mapping[str, tuple[int, int]],
    track: Track,
) -> None:
    """Write the trained sets' sides as PNG files, and for each side a table of paths and texts.

    The tables are what open_clip's ``--dataset-type csv`` reads: ``filepath`` and ``title``, separated by
    tabs, with paths relative to ``folder``.
    """
    for side in SIDES:
        start, stop = ranges.get(side, (0, 0))
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(("filepath", "title"))
            for record in track(records[start:stop], stop - start, f"Files: {side}"):
                path = Path("png") / f"{record.index // _FOLDER:04d}" / f"{record.index:08d}.png"
                (folder / path.parent).mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(pngs[record.index])
                table.writerow((path.as_posix(), record.text if side == "train" else record.caption))
