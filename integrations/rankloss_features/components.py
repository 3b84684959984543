"""Principal components of a folder's features."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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


def first_components(features: Any, width: int) -> Components:
    """The first principal components of a folder's features, about the origin, of both modalities together.

    They are the eigenvectors of Σ x·xᵀ with the largest eigenvalues; x are the unit-norm rows.

    Args:
        features: A :class:`rankloss_features.Features`, whose method ``components`` this is.
        width: The number of components.

    Raises:
        ValueError: Images and texts have separate spaces, ``width`` exceeds the dimensions or the rows, or a
            row is not as it was written.
    """
    if not features.common_space:
        raise ValueError(
            f"{features.path} has images and texts of separate spaces, which no one matrix can copy; learn "
            "the ranks within each modality instead: --loss rankclip-distill"
        )
    arrays = list(features.arrays.values())
    rows = len(features) - features.about["skipped"]
    full_width = arrays[0].shape[1]
    if not 1 <= width <= min(full_width, rows):
        raise ValueError(
            f"width must be at least 1 and at most the {full_width} dimensions and the {rows} rows of "
            f"{features.path}; got {width}"
        )
    features.check()
    products = np.zeros((full_width, full_width))  # Σ x·xᵀ
    for array in arrays:
        for first in range(0, len(array), _BLOCK):
            block = array[first : first + _BLOCK].astype(np.float64)
            block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)  # absent rows are 0
            products += block.T @ block
    variances, vectors = np.linalg.eigh(products)  # ascending
    matrix = np.flip(vectors, axis=1)[:, :width]
    # The largest entry of each vector is positive, so that all processes have the same signs.
    row_of_largest = np.abs(matrix).argmax(axis=0)
    largest = np.take_along_axis(matrix, row_of_largest[None], axis=0)
    matrix = np.ascontiguousarray(matrix * np.sign(largest), np.float32)
    variances = variances.clip(min=0)  # which rounding may leave below
    explained = float(variances[-width:].sum() / variances.sum())
    _logger.info(
        "%s: %d of %d dimensions, explained variance %.1f %%",
        features.path,
        width,
        full_width,
        100 * explained,
    )
    return Components(torch.from_numpy(matrix), explained)
