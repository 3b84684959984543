"""Principal components of a folder's features, computed once and kept in the folder.

``components.npz`` has all D' components and a hash of them and of the rows that they were computed from. A
file that is damaged, or of other rows, is computed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankloss_features.locking import locked

if TYPE_CHECKING:
    from rankloss_features.folder import Array, Features

_FILE = "components.npz"
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


def kept_basis(features: Features) -> Basis:
    """The components in the folder, which are computed by the first process that asks for them.

    A folder that cannot be written is left as it is, and every process computes them.
    """
    file = Path(features.path, _FILE)
    found = _read(file, features)
    if found is not None:
        return found
    try:
        with locked(file.parent, wait=True):
            found = _read(file, features)
            if found is None:
                found = _computed(features)
                _write(file, found, features)
    except OSError as error:
        _logger.info("%s cannot be written (%s): its components stay in memory", features.path, error)
        found = found or _computed(features)
    return found


def _computed(features: Features) -> Basis:
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


def _hash(basis: Basis, features: Features) -> str:
    digest = hashlib.blake2b(str(features.about["rows_hash"]).encode(), digest_size=8)
    for array in basis:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(file: Path, features: Features) -> Basis | None:
    if not file.exists():
        return None
    try:
        with np.load(file) as stored:
            basis = Basis(stored["matrix"], stored["variances"])
            if str(stored["hash"]) == _hash(basis, features):
                return basis
        reason = "it is damaged, or of other rows"
    except Exception as error:  # NumPy raises many of a damaged file
        reason = str(error)
    _logger.warning("%s is computed again: %s", file, reason)
    return None


def _write(file: Path, basis: Basis, features: Features) -> None:
    """Write the file, whole or not at all."""
    partial = file.with_name(f".{file.name}")
    with partial.open("wb") as written:
        np.savez(written, **basis._asdict(), hash=_hash(basis, features))
        written.flush()
        os.fsync(written.fileno())
    partial.replace(file)


def first_components(features: Features, width: int) -> Components:
    """See :meth:`rankloss_features.Features.components`."""
    if not features.common_space:
        raise ValueError(
            f"{features.path} has images and texts of separate spaces, which no one matrix can copy; learn "
            "the ranks within each modality instead: --loss rankclip-distill"
        )
    basis, rows = features.basis, int(features.present(slice(None)).sum())
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
