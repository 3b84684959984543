"""Folders of the same pairs, joined into one whose cosines are the weighted means of theirs: ``--merge``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss_features.data import Sample, Spans
from rankloss_features.folder import SPACES, Array, Features
from rankloss_features.teachers import Encoder, Teacher


class Joined:
    """The pairs that folders share; its members are those of :class:`rankloss_features.data.Table`.

    Args:
        folders: The folders.

    Attributes:
        hashes: The hash of each pair.

    Raises:
        ValueError: The folders are of other pairs, or of other modalities.
    """

    is_stream = False

    def __init__(self, folders: list[Features]) -> None:
        first = folders[0]
        for other in folders[1:]:
            if other.arrays.keys() != first.arrays.keys():
                listed = [f"{x.path} has {' and '.join(x.arrays)}" for x in (first, other)]
                raise ValueError(f"--merge takes folders of the same modalities; {', '.join(listed)}")
            rows = min(len(first), len(other))
            differs = first.pairs[:rows] != other.pairs[:rows]
            if differs.any() or len(first) != len(other):
                row = int(differs.argmax()) if differs.any() else rows
                raise ValueError(
                    f"--merge takes folders of the same pairs in the same order; row {row} of {other.path}, "
                    f"of {len(other)} rows, is not row {row} of {first.path}, of {len(first)} rows"
                )
        self.about, self.counts, self.hashes = first.about["data"], [len(first)], first.pairs
        self.folders = folders

    def read(self, source: int, spans: Spans) -> Iterator[list[Sample]]:  # noqa: ARG002
        """The rows that have features in all folders."""
        for span in spans:
            present = np.all([folder.present(slice(*span)) for folder in self.folders], axis=0)
            yield [Sample(int(row), "", "") for row in span[0] + np.flatnonzero(present)]


def load(paths: list[str], scales: list[float] | None) -> tuple[Joined, Teacher]:
    """The pairs of folders, and a teacher that gives their features side by side.

    With unit-norm features x_k and scales s_k, x = (√s_1·x_1, √s_2·x_2, …) / √Σs, whose cosine is
    Σ s_k·cos_k / Σs.

    Args:
        paths: The folders of ``--merge``, each of which is read once to be checked.
        scales: The weights of their cosines; None for equal ones.

    Raises:
        ValueError: A folder is damaged, or they do not go together; or the scales are not one positive number
            per folder.
    """
    scales = [1.0] * len(paths) if scales is None else scales
    if len(paths) < 2 or len(scales) != len(paths):
        raise ValueError(
            f"--merge takes two folders or more, and --scales one number for each; got {len(paths)} and "
            f"{len(scales)}"
        )
    if not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"--scales must be positive numbers; got {scales}")
    folders = [Features(path).check() for path in paths]
    joined = Joined(folders)
    about = [
        {"teacher": folder.about["teacher"], "rows_hash": folder.about["rows_hash"], "scale": scale}
        for folder, scale in zip(folders, scales, strict=True)
    ]
    encoders = {}
    for name in folders[0].arrays:
        arrays = [folder.arrays[name] for folder in folders]
        prepare = partial(_side_by_side, arrays, scales)
        encoders[name] = Encoder(prepare, lambda rows: rows, sum(array.shape[1] for array in arrays))
    spaces = SPACES[not all(folder.common_space for folder in folders)]
    return joined, Teacher({"merged": about}, encoders, spaces=spaces)


def _side_by_side(arrays: list[Array], scales: list[float], samples: list[Sample]) -> Tensor:
    rows = [sample.row for sample in samples]
    parts = [F.normalize(torch.from_numpy(array[rows].astype(np.float32)), dim=-1) for array in arrays]
    return torch.cat([math.sqrt(scale) * x for scale, x in zip(scales, parts, strict=True)], dim=-1)
