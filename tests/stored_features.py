"""Folders of a teacher's features, made of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankloss_features.folder import (
    COMMON_SPACE,
    PICTURES,
    SEPARATE_SPACES,
    Draft,
    hashes_of_pairs,
    identity_of,
    numbers_of,
)


def features_folder(
    path: Path,
    pairs: Sequence[tuple[str, str]] | None = None,
    spaces: str | None = None,
    pictures: Sequence[bytes] | None = None,
    **arrays: np.ndarray[Any, Any],
) -> str:
    """Write a folder of features made of arrays by modality; its path.

    Args:
        path: The folder.
        pairs: Images' names and captions, by default ``0.png`` and ``a0``, and so on.
        spaces: As ``folder.json`` says it, by default common if all widths are equal.
        pictures: The content of the images' files, if a teacher is to have read them.
        **arrays: ``[N, D]`` for each modality, such as ``image_features``.
    """
    rows = min(len(array) for array in arrays.values())
    dtype = next(iter(arrays.values())).dtype
    pairs = pairs or [(f"{row}.png", f"a{row}") for row in range(rows)]
    images, captions = zip(*pairs, strict=True)
    path.mkdir()
    widths = {name: array.shape[-1] for name, array in arrays.items()}
    if spaces is None:
        spaces = COMMON_SPACE if len(set(widths.values())) == 1 else SEPARATE_SPACES
    about = {"widths": widths, "dtype": str(dtype), "shard_rows": rows, "spaces": spaces}
    about["has_picture_hashes"] = pictures is not None
    Draft.begin(path, about, hashes_of_pairs(captions, images))
    draft = Draft(str(path))
    files = {name: array[:rows] for name, array in arrays.items()}
    if pictures is not None:
        files[PICTURES] = numbers_of([identity_of(content) for content in pictures])
    draft.save(0, files)
    draft.finish()
    return str(path)
