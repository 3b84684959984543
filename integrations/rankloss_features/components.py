"""Principal components of a folder's features, computed once and kept in the folder.

``components.npz`` has all D' components and the hash of the rows that they were computed from. A file that is
damaged, which its archive's checksums tell, or of other rows, is computed again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankloss_features.locking import locked

Array = np.ndarray[Any, Any]

_BLOCK = 16_384  # rows that are read together
_logger = logging.getLogger("rankloss_features")


class Components(NamedTuple):
    """The first principal components of a folder's features.

    Attributes:
        matrix: ``[D', width]``, float32, of orthonormal columns in the order of their variance.
        explained: The fraction of the features' mean square that the components keep.
    """

    matrix: Tensor
    explained: float


class Basis(NamedTuple):
    """All principal components.

    Attributes:
        matrix: ``[D', D']``, float32, of orthonormal columns.
        variances: ``[D']``, float64, the sums of squares along the columns, in descending order.
    """

    matrix: Array
    variances: Array


def _kept_basis(features: Any) -> Basis:
    """The components in the folder, which are computed by the first process that asks for them.

    A folder that cannot be written is left as it is, and every process computes them.
    """
    file = Path(features.path, "components.npz")
    found = _read(file, features)
    if found is not None:
        return found
    try:
        with locked(file.parent, wait=True):
            found = _read(file, features)
            if found is None:
                found = _computed(features)
                partial = file.with_name(f".{file.name}")  # whole or not at all
                with partial.open("wb") as written:
                    np.savez(written, **found._asdict(), rows=features.about["rows_hash"])
                partial.replace(file)
    except OSError as error:
        _logger.info("%s cannot be written (%s): its components stay in memory", features.path, error)
    return found or _computed(features)


def _computed(features: Any) -> Basis:
    """Eigenvectors of the sum over modalities of Xᵀ·X, of rows of unit norm.

    The sign of each is that of its entry of largest magnitude.
    """
    features.check()  # or damaged rows would be kept under the hash of the written ones
    arrays = list(features.arrays.values())
    products = np.zeros((arrays[0].shape[1],) * 2)
    for array in arrays:
        for first in range(0, len(array), _BLOCK):
            rows = array[first : first + _BLOCK].astype(np.float64)
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)  # absent rows are 0
            products += rows.T @ rows
    variances, vectors = np.linalg.eigh(products)  # ascending
    matrix = vectors[:, ::-1]
    largest = np.take_along_axis(matrix, np.abs(matrix).argmax(axis=0)[None], axis=0)
    matrix = np.ascontiguousarray(matrix * np.sign(largest), np.float32)
    return Basis(matrix, np.ascontiguousarray(variances[::-1].clip(min=0)))


def _read(file: Path, features: Any) -> Basis | None:
    if not file.exists():
        return None
    try:
        with file.open("rb") as opened, np.load(opened) as stored:
            if str(stored["rows"]) == features.about["rows_hash"]:
                return Basis(stored["matrix"], stored["variances"])
        reason = "it is of other rows"
    except Exception as error:  # NumPy raises many of a damaged file
        reason = str(error)
    _logger.warning("%s is computed again: %s", file, reason)
    return None


def first_components(features: Any, width: int) -> Components:
    """See :meth:`rankloss_features.Features.components`."""
    if not features.common_space:
        raise ValueError(
            f"{features.path} has images and texts of separate spaces, which no one matrix can copy; learn "
            "the ranks within each modality instead: --loss rankclip-distill"
        )
    basis, rows = _kept_basis(features), int(features.present(slice(None)).sum())
    full = len(basis.variances)
    if not 1 <= width <= min(full, rows):
        raise ValueError(
            f"width must be at least 1 and at most the {full} dimensions and the {rows} rows of "
            f"{features.path}; got {width}"
        )
    explained = float(basis.variances[:width].sum() / basis.variances.sum())
    _logger.info(
        "%s: %d of %d dimensions, explained variance %.1f %%", features.path, width, full, 100 * explained
    )
    return Components(torch.from_numpy(np.ascontiguousarray(basis.matrix[:, :width])), explained)
