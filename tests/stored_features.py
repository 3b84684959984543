"""Folders of a teacher's features, made of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankloss_features.folder import SPACES, Draft, hashes_of_pairs


def stored(
    path: Path,
    pairs: Sequence[tuple[str, str]] | None = None,
    spaces: str | None = None,
    **arrays: np.ndarray[Any, Any],
) -> str:
    """A folder of features, of images and captions ``0.png``, ``a0`` and so on if no others are given."""
    rows, dtype = min(map(len, arrays.values())), next(iter(arrays.values())).dtype
    images, captions = zip(*(pairs or [(f"{i}.png", f"a{i}") for i in range(rows)]), strict=True)
    path.mkdir()
    widths = {name: array.shape[-1] for name, array in arrays.items()}
    spaces = spaces or SPACES[len(set(widths.values())) - 1]
    about = {"widths": widths, "dtype": str(dtype), "shard_rows": rows, "spaces": spaces}
    Draft.begin(path, about, hashes_of_pairs(captions, images))
    draft = Draft(str(path))
    draft.save(0, {name: array[:rows] for name, array in arrays.items()})
    draft.finish()
    return str(path)
