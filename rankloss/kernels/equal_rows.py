"""Equal rows of features on a GPU: the Python side of the two kernels that find them.

In torch's operations a hash of every row takes 28 bytes per entry, and the comparison with a candidate 18.
Here it is 4 for the hash, and 8 for the comparison of those rows that have another candidate than themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankloss.kernels.rows import interpreted
from rankloss.operators import register

_ROWS, _COLUMNS, _WARPS = 8, 256, 8
_INTERPRETED_ROWS = 64  # fewer programs, each of which is interpreted


def first_equal(features: Tensor) -> Tensor:
    """What :func:`rankloss.equal_rows.first_equal` gives, from one pass over float32 features; never None."""
    hashes = hash_rows(features)
    ordered, order = hashes.sort(stable=True)
    return confirm_equals(features, order[torch.searchsorted(ordered, hashes)])


def hash_rows(features: Tensor) -> Tensor:
    """A hash of every row, as :func:`rankloss.equal_rows.row_hashes` makes it: ``[N]`` of float32 ``[N, D]``.

    Example:
        >>> hash_rows(torch.zeros(3, 8, device="meta")).shape  # on a GPU the same call computes
        torch.Size([3])
    """
    hashes: Tensor = torch.ops.rankloss.hash_rows(features.detach().contiguous())
    return hashes


def confirm_equals(features: Tensor, candidates: Tensor) -> Tensor:
    """``candidates[i]`` where that row equals row i in every value, else i: ``[N]``.

    Example:
        >>> x, candidates = torch.zeros(3, 8, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
        >>> confirm_equals(x, candidates).shape
        torch.Size([3])
    """
    first: Tensor = torch.ops.rankloss.confirm_equals(features.detach().contiguous(), candidates.contiguous())
    return first


def _hash_rows(features: Tensor) -> Tensor:
    hashes = torch.empty(len(features), dtype=torch.int64, device=features.device)
    if len(features):
        from rankloss.kernels.device.equal_rows import hash_rows as kernel

        with torch.cuda.device_of(features):
            kernel[_grid(features)](features.view(torch.int32), hashes, *features.shape, **_options())
    return hashes


def _hash_rows_fake(features: Tensor) -> Tensor:
    return features.new_empty(len(features), dtype=torch.int64)


def _confirm_equals(features: Tensor, candidates: Tensor) -> Tensor:
    first = torch.empty_like(candidates)
    if len(features):
        from rankloss.kernels.device.equal_rows import confirm_equals as kernel

        with torch.cuda.device_of(features):
            kernel[_grid(features)](features, candidates, first, *features.shape, **_options())
    return first


def _confirm_equals_fake(_features: Tensor, candidates: Tensor) -> Tensor:
    return torch.empty_like(candidates)


def _options() -> dict[str, int]:
    return {"ROWS": _INTERPRETED_ROWS if interpreted() else _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS}


def _grid(features: Tensor) -> tuple[int]:
    return (-(-len(features) // _options()["ROWS"]),)


register("hash_rows", "(Tensor features) -> Tensor", _hash_rows, _hash_rows_fake)
register(
    "confirm_equals", "(Tensor features, Tensor candidates) -> Tensor", _confirm_equals, _confirm_equals_fake
)
