"""The icons as the trainer reads them: small pictures, tables of pairs, and a fingerprint of both sides.

The pictures are those of ``studies.icons``, averaged from 64 to 32 pixels. A table for n pairs holds the
first n records of the training side, which are a random sample of it, so each smaller one is a part of each
larger one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from studies.icons.load import Icons, Part

from .captions import synthetic_caption

SIZE = 32
COLUMNS = ("filepath", "title", "synthetic")
_FOLDER = 1000  # files in a folder
# What a labelled set is, in the order in which it is fingerprinted, whatever the order in its file.
_LABELS = ("name", "shift", "classes", "templates", "index", "label")


@dataclasses.dataclass(frozen=True)
class Tables:
    """Files that :func:`prepare` wrote, for every number of pairs."""

    tables: dict[int, str]  # relative to the output folder
    digests: dict[int, str]  # fingerprints of the table and of everything that is measured on


def small(pixels: np.ndarray) -> Image.Image:
    """Average a square picture, ``uint8 [S, S, 3]``, down to :data:`SIZE`, the models' input size."""
    return Image.fromarray(pixels).reduce(len(pixels) // SIZE)


def prepare(icons: Icons, output: Path, sizes: Sequence[int]) -> Tables:
    """Write the training pictures and a table for every number of pairs below ``output``.

    The trainer is started in ``output``, and the paths in the tables are relative to it.

    Raises:
        ValueError: If the icons have fewer training pairs.
    """
    part = icons.part("train")
    largest = max(sizes)
    if largest > len(part.records):
        raise ValueError(f"sizes: {largest} pairs are needed, the icons have {len(part.records)}")
    evaluation = evaluation_digest(icons)
    folder = output / "pairs" / f"{largest}-{evaluation[:8]}-{_recipe()}"
    if not folder.is_dir():
        _write(part, folder, output, largest)
    lines = (folder / "pairs.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    tables, digests = {}, {}
    for pairs in sizes:
        text = "".join(lines[: pairs + 1])
        path = folder / f"pairs-{pairs}.csv"
        if not path.is_file():
            path.write_text(text, encoding="utf-8")
        tables[pairs] = path.relative_to(output).as_posix()
        # The folder of the pictures, and how many more it holds, makes no difference.
        content = text.replace(folder.relative_to(output).as_posix(), "")
        digests[pairs] = hashlib.sha256(f"{evaluation}{content}".encode()).hexdigest()[:16]
    return Tables(tables, digests)


def evaluation_digest(icons: Icons) -> str:
    """Return a fingerprint of the package, of every record and of every label."""
    digest = hashlib.sha256(icons.manifest["tarball"].encode())
    digest.update((icons.folder / "records.csv").read_bytes())
    for name in icons.manifest["labelled"]:
        labels = json.loads((icons.folder / "labels" / f"{name}.json").read_text(encoding="utf-8"))
        digest.update((json.dumps({key: labels[key] for key in _LABELS}) + "\n").encode())
    return digest.hexdigest()


def _recipe() -> str:
    """Return a fingerprint of the code that writes the pairs, by which outdated ones are recognised."""
    sources = (Path(__file__), Path(__file__).with_name("captions.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def _write(part: Part, folder: Path, output: Path, pairs: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        work = Path(temporary) / "pairs"
        prefix = folder.relative_to(output).as_posix()
        rows = ["\t".join(COLUMNS)]
        for number in tqdm(range(pairs), "Training pictures"):
            record = part.records[number]
            image = small(part.images[number])
            pixels = np.asarray(image)
            name = f"{number // _FOLDER:03d}/{number:06d}.png"
            path = work / name
            if number % _FOLDER == 0:
                path.parent.mkdir(parents=True)
            image.save(path)
            synthetic = synthetic_caption(pixels, record.style, record.categories)
            rows.append("\t".join([f"{prefix}/{name}", record.text, synthetic]))
        (work / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
