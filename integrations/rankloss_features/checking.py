"""The report of ``rankloss features --check`` on a folder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rankloss_features.data import Data
from rankloss_features.folder import NAMES, Array, Features

_SAMPLE = 1000  # pairs that are ranked against each other
_SHOWN = 3  # of these, whose nearest captions are shown
_NEAREST = 10


def report(path: str, data: Data) -> str:
    """Compare a folder with data, read all of its rows, and describe them.

    Args:
        path: The folder.
        data: The pairs that it should be of.

    Raises:
        ValueError: It is not of these pairs, or its rows are no teacher's.
    """
    features = Features(path).check()
    about, present = features.about, np.flatnonzero(features.present(slice(None)))
    rows = present[np.unique(np.linspace(0, len(present) - 1, _SAMPLE).astype(int))]
    captions: dict[int, str] = {}

    def pairs() -> Iterator[tuple[list[str], list[str]]]:
        first = 0
        for block in data.pairs():
            inside = rows[(rows >= first) & (rows < first + len(block[0]))]
            captions.update({int(row): block[0][row - first] for row in inside})
            first += len(block[0])
            yield block

    features.compare(pairs(), str(data.about["data"]))
    teacher = ", ".join(f"{name} {value!r}" for name, value in about["teacher"].items())
    lines = [f"{path}: {len(features):,} rows of {data.about['data']}, pair by pair", f"teacher: {teacher}"]
    if about["skipped"]:
        lines.append(f"{about['skipped']:,} rows without features: their pictures cannot be read")
    lines += [f"{name}: {x.dtype}, {x.shape[1]} columns" for name, x in features.arrays.items()]
    return "\n".join([*lines, *_ranked(features, rows, captions)])


def _ranked(features: Features, rows: Array, captions: dict[int, str]) -> Iterator[str]:
    """Recall of some pairs among each other, where equal rows share it; the captions nearest to three."""
    arrays = features.take(rows)
    asked, texts = (arrays.get(name, next(iter(arrays.values()))) for name in NAMES)
    kind = "picture"
    if len(arrays) < len(NAMES) or not features.common_space:
        yield "R@1 is not defined: this teacher has no space of both images and texts"
        asked, kind = texts, "caption" if NAMES[1] in arrays else "picture"
    cosines = asked @ texts.T
    if asked is not texts:
        best = [cosines > cosines.max(axis, keepdims=True) - 1e-6 for axis in (1, 0)]
        forth, back = ((x.diagonal() / x.sum(axis)).mean() for axis, x in zip((1, 0), best, strict=True))
        yield f"R@1 among {len(rows):,} pairs: {forth:.1%} from image to text, {back:.1%} from text to image"
    for i in np.linspace(0, len(rows) - 1, _SHOWN + 2).astype(int)[1:-1]:
        yield f"row {rows[i]}, {captions[rows[i]]!r}; nearest to its {kind} among these:"
        for j in np.argsort(-cosines[i], kind="stable")[:_NEAREST]:
            yield f"  {cosines[i, j]:6.3f}  row {rows[j]}, {captions[rows[j]]!r}"
