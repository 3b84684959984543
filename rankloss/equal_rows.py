"""Equal rows of a matrix of features, compared in every bit.

Ties have to be exact for a loss to be independent of the order in which items arrive. A matrix product does
not give that for free: the columns of two identical captions can come out a rounding apart, because the
kernel sums edge columns in another order than the rest. So equal rows of features are recognised from their
bits, before any product is taken.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.precision import can_sync

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio in 64 bits: its multiples are far apart
MIXING_SHIFT = 31  # no bit then has fewer than 32 above it, itself or its copy


def first_occurrence(features: Tensor) -> Tensor:
    """:func:`first_equal` as a tensor in any case."""
    found = first_equal(features)
    return torch.arange(len(features), device=features.device) if found is None else found


def first_equal(features: Tensor) -> Tensor | None:
    """Index of the first row that equals row i, for every i, ``[N]``; None where a look tells that none are.

    It is i itself where the row is the first of its kind. A row that holds NaN equals no row.

    Args:
        features: ``[N, D]``, float32 or float64.

    Example:
        >>> first_equal(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
        [0, 1, 0]

    Rows are compared through a 64-bit hash, and each match is confirmed on the values themselves, so rows
    that differ never count as equal. Where rows that differ have one hash, which is to be expected once in
    some 10⁹ batches, those behind the first may miss their equals. Memory is O(N·D), and an accelerator's
    host waits for nothing.
    """
    features = features.detach()
    looks = can_sync(features)
    if looks and not _begin_alike(features):
        return None
    hashes = row_hashes(features)
    ordered, order = hashes.sort(stable=True)  # stable: a group's first is its least
    if looks and not bool((ordered[1:] == ordered[:-1]).any()):
        return None
    candidate = order[torch.searchsorted(ordered, hashes)]
    same = (features[candidate] == features).all(-1)  # equal rows have one candidate
    own = torch.arange(len(features), device=features.device)
    return torch.where(same, candidate, own)


def _begin_alike(features: Tensor) -> bool:
    """True if two rows have the same first eight bytes, as equal rows do; of a matrix on a CPU."""
    first = np.add(features.numpy()[:, : 8 // features.itemsize], 0.0, order="C")  # −0.0 equals 0.0
    return len(set(first.view(f"i{first[0].nbytes}").ravel().tolist())) < len(first)


def row_hashes(features: Tensor) -> Tensor:
    """A 64-bit hash of every row, ``[N]``; equal rows have equal ones.

    The bits of the entries, read as integers of 64 bits, are mixed, multiplied by an odd number of their
    column and summed, all in wrapping integer arithmetic, which gives one value whatever the order of
    summation. No step is arithmetic on the entries themselves, where a flushed subnormal would depend on the
    thread.
    """
    bits = features.detach().contiguous().view(_BITS[features.dtype])
    bits = F.threshold(bits, torch.iinfo(bits.dtype).min, 0)  # −0.0 equals 0.0
    if bits.dtype == torch.int32 and bits.shape[1] % 2:
        bits = F.pad(bits, (0, 1))
    words = bits.view(torch.int64)
    # Of a float32 like 1.0 only the upper bits are not zero, and a product would move them out of the word.
    words = (words >> MIXING_SHIFT).bitwise_xor_(words)
    factors = torch.arange(words.shape[1], device=words.device).mul_(GOLDEN).bitwise_or_(1)
    return words.mul_(factors).sum(-1)
