"""Equal rows of features on a GPU.

With torch's operations the hash of a row moves 40 bytes per entry and the comparison with a candidate 18. The
kernels move 4 for the hash, and 8 for the comparison if the candidate is another row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankloss_triton import launching

_ROWS, _COLUMNS, _WARPS = 8, 256, 8
_INTERPRETED_ROWS = 64  # fewer programs, each of which is interpreted


def first_equal(features: Tensor) -> Tensor:
    """The index of the first row that equals row i in every value: ``[N]`` of float32 ``[N, D]``.

    −0 equals 0; a row that holds NaN equals itself alone. If rows that differ share a hash of 64 bits, those
    behind the first may miss their equals. Nothing waits for the device.

    Example:
        >>> first_equal(torch.zeros(3, 8, device="meta")).shape  # on a GPU the same call computes
        torch.Size([3])
    """
    hashes = hash_rows(features)
    ordered, order = hashes.sort(stable=True)  # stable: a group's first is its least
    candidates = order[torch.searchsorted(ordered, hashes)]  # of each row, the first with the same hash
    return confirm_equals(features, candidates)


def hash_rows(features: Tensor) -> Tensor:
    """Hashes of float32 rows ``[N, D]``: ``[N]``; equal rows have equal hashes."""
    features = features.detach().contiguous()
    hashes = features.new_empty(len(features), dtype=torch.int64)
    bits = features.view(torch.int32)  # which the kernel hashes, −0 as 0
    _launch("hash_rows", (bits, hashes), features.shape)
    return hashes


def confirm_equals(features: Tensor, candidates: Tensor) -> Tensor:
    """``candidates[i]`` where that row equals row i in every value, else i: ``[N]``."""
    first = torch.empty_like(candidates)
    _launch("confirm_equals", (features.detach().contiguous(), candidates, first), features.shape)
    return first


def _launch(kernel: str, tensors: tuple[Tensor, ...], shape: torch.Size) -> None:
    """Launch a kernel over features of a shape, rows by columns; each program takes some of the rows."""
    rows_of_program = _INTERPRETED_ROWS if launching.is_interpreted() else _ROWS
    programs = math.ceil(shape[0] / rows_of_program)
    options = {"ROWS": rows_of_program, "COLUMNS": _COLUMNS, "num_warps": _WARPS}
    if programs:  # a launch of none is an error of CUDA's
        launching.launch(f"equal_rows.{kernel}", programs, tensors, *shape, **options)
