"""What ``rankloss features --check`` says of a folder."""

from __future__ import annotations

import numpy as np

from rankloss_features.data import Data
from rankloss_features.folder import Features, hashes_of_rows

_SHOWN = 3  # rows whose nearest captions are shown
_NEAREST = 10


def report(path: str, data: Data) -> str:
    """Compare a folder with data, read all of its rows, and describe them.

    Args:
        path: The folder.
        data: The pairs that it should be of.

    Raises:
        ValueError: It is not of these pairs, or its rows are not what a teacher gives.
    """
    features = Features(path).check()
    features.compare(data.pairs(), str(data.about["data"]))
    about = features.about
    teacher = ", ".join(f"{name} {value}" for name, value in about["teacher"].items())
    lines = [f"{path}: {len(features):,} rows of {data.about['data']}, pair by pair", f"teacher: {teacher}"]
    if about["skipped"]:
        lines.append(f"{about['skipped']:,} rows without features: their pictures cannot be read")
    lines += [_described(features, name) for name in features.arrays]
    return "\n".join([*lines, *_nearest_captions(features, data)])


def _described(features: Features, name: str) -> str:
    """Norms, constants and duplicates of one of the arrays."""
    array = features.arrays[name]
    norms, hashes = [], []
    least, most = np.full(array.shape[1], np.inf), np.full(array.shape[1], -np.inf)
    for _, present, arrays in features.blocks():
        block = arrays[name][present].astype(np.float32)
        norms.append(np.linalg.norm(block, axis=1).astype(np.float16))
        hashes.append(hashes_of_rows([arrays[name][present]]))
        if len(block):
            least, most = np.minimum(least, block.min(0)), np.maximum(most, block.max(0))
    norm, distinct = np.concatenate(norms).astype(np.float32), len(np.unique(np.concatenate(hashes)))
    return (
        f"{name}: {array.dtype}, {array.shape[1]} columns, {int((least == most).sum())} of them constant; "
        f"norms {norm.min():.3f} to {norm.max():.3f}; {len(norm) - distinct:,} rows equal another one"
    )


def _nearest_captions(features: Features, data: Data) -> list[str]:
    """For three rows the captions that the teacher finds nearest."""
    rows = np.unique(np.linspace(0, len(features) - 1, _SHOWN + 2).astype(int)[1:-1])
    texts = features.arrays.get("text_features", features.arrays.get("image_features"))
    images = features.arrays.get("image_features", texts)
    assert texts is not None
    assert images is not None
    if images.shape[1] != texts.shape[1]:
        images = texts  # of two encoders, which cannot be compared
    asked = images[rows].astype(np.float32)
    best, places = np.full((len(rows), 0), 0.0, np.float32), np.empty((len(rows), 0), int)
    for first, present, arrays in features.blocks():
        block = arrays.get("text_features", arrays.get("image_features"))
        assert block is not None
        cosines = np.where(present, asked @ block.astype(np.float32).T, -np.inf)
        found = np.broadcast_to(np.arange(first, first + len(block)), cosines.shape)
        best, places = np.hstack([best, cosines]), np.hstack([places, found])
        order = np.argsort(-best, axis=1, kind="stable")[:, :_NEAREST]
        best, places = np.take_along_axis(best, order, 1), np.take_along_axis(places, order, 1)
    captions = _captions(data, {int(x) for x in np.concatenate([rows, places.ravel()])})
    kind = "picture" if images is not texts else "caption"
    lines = []
    for row, near, values in zip(rows.tolist(), places.tolist(), best.tolist(), strict=True):
        lines.append(f"row {row}, {captions[row]!r}; nearest to its {kind}:")
        lines += [f"  {value:6.3f}  row {i}, {captions[i]!r}" for i, value in zip(near, values, strict=True)]
    return lines


def _captions(data: Data, rows: set[int]) -> dict[int, str]:
    found, first = {}, 0
    for captions, _ in data.pairs():
        found.update({row: captions[row - first] for row in rows if first <= row < first + len(captions)})
        first += len(captions)
    return found
