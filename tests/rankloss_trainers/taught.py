"""Folders of a teacher's features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def folder(
    path: Path,
    dataset: Any,
    features: Mapping[str, Tensor],
    image: str,
    caption: str,
    spaces: str = "common",
) -> str:
    """A folder of these features of a dataset's pairs."""
    from tiny_teacher import written

    from rankloss_features.data import Table
    from rankloss_features.teachers import Encoder, Teacher

    def encoder(rows: Tensor) -> Encoder:
        return Encoder(lambda samples: rows[[x.row for x in samples]], lambda x: x, rows.shape[1])

    teacher = Teacher({}, {name: encoder(x) for name, x in features.items()}, spaces=spaces)
    path_of: str = written(path, Table(dataset, image, caption, data="given"), teacher, dtype="float32").path
    return path_of
