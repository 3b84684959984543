"""The principal components of a teacher's features: what a narrower student's features are compared with.

``python -m miniature_paper.components FOLDER WIDTH OUTPUT`` writes them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from examples_common.terminal import positive

from rankloss_features.folder import Features

Array: TypeAlias = npt.NDArray[Any]

_ROWS = 2**16  # that are read at a time


def principal_components(images: Array, texts: Array, width: int) -> Array:
    """``[D', width]`` of features ``[M, D']``: the directions in which those of both modalities are largest.

    About the origin, not about a mean: of all projections to this width the one that keeps their products
    best. Both modalities share it, so that an image and a text can still be compared.

    Raises:
        ValueError: If the features have fewer numbers than ``width``.
    """
    if images.shape[1] < width:
        raise ValueError(f"the teacher's features have {images.shape[1]} numbers, fewer than {width}")
    products = np.zeros((images.shape[1],) * 2)
    for x in (images, texts):
        for start in range(0, len(x), _ROWS):
            part = x[start : start + _ROWS].astype(np.float64)
            products += part.T @ part
    _, vectors = np.linalg.eigh(products)  # in ascending order
    return np.ascontiguousarray(vectors[:, ::-1][:, :width])


def write_components(folder: Path, width: int, output: Path) -> None:
    """Write those of a folder of ``rankloss features`` as a ``.npy`` file, for ``--rivals-components``.

    Raises:
        ValueError: If it is no such folder, or one of narrower features or of one modality alone.
    """
    stored = Features(str(folder)).arrays
    names = ("image_features", "text_features")
    if missing := [name for name in names if name not in stored]:
        raise ValueError(f"{folder} holds no {missing[0]}")
    found = principal_components(*(stored[name] for name in names), width).astype(np.float32)
    partial = output.with_name(f".{output.name}")
    with partial.open("wb") as file:
        np.save(file, found)
    partial.replace(output)  # atomic


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Write the principal components of a teacher's features, so many as the student's "
        "features have numbers, for --rivals-components."
    )
    parser.add_argument("folder", type=Path, help="of `rankloss features`, with images and texts")
    parser.add_argument("width", type=positive, help="of the student: its embed_dim")
    parser.add_argument("output", type=Path, help="an .npy file")
    args = parser.parse_args()
    try:
        write_components(args.folder, args.width, args.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
