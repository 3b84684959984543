"""Which rows of a matrix of features are equal in every bit.

Ties have to be exact for a loss to be independent of the order in which items arrive. A matrix product does
not give that for free: the columns of two identical captions can come out a rounding apart, because the
kernel sums edge columns in another order than the rest. So equal rows of features are recognised from their
bits, before any product is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.precision import may_look_at

__all__ = ["first_equal", "first_occurrence", "row_hashes"]

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_FIRST_FACTOR = 1.3247179572447460  # squared, that of a first column: any number without a pattern


def first_occurrence(features: Tensor) -> Tensor:
    """Index of the first row that equals row i, for every i.

    It is i itself where the row is the first of its kind. A row that holds NaN equals no row.

    Args:
        features: ``[N, D]``, float32 or float64.

    Returns:
        Integer tensor of shape ``[N]``.

    Example:
        >>> first_occurrence(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
        [0, 1, 0]
    """
    found = first_equal(features)
    return torch.arange(len(features), device=features.device) if found is None else found


def first_equal(features: Tensor) -> Tensor | None:
    """:func:`first_occurrence`; None where no two rows are equal and a look tells so.

    Rows are compared through a 64-bit hash, and each match is confirmed on the values themselves, so rows
    that differ never count as equal. Where rows that differ have one hash, which is to be expected once in
    some 10⁹ batches, those behind the first may miss their equals. Memory is O(N·D), and an accelerator's
    host waits for nothing.
    """
    features = features.detach()
    hashes = row_hashes(features)
    ordered, order = hashes.sort(stable=True)  # stable: a group's first is its least
    if may_look_at(features) and not bool((ordered[1:] == ordered[:-1]).any()):
        return None
    candidate = order[torch.searchsorted(ordered, hashes)]
    same = (features[candidate] == features).all(-1)  # equal rows have one candidate
    own = torch.arange(len(features), device=features.device)
    return torch.where(same, candidate, own)


def row_hashes(features: Tensor) -> Tensor:
    """A 64-bit hash of every row, ``[N]``; equal rows have equal ones.

    The bits of the entries, 32 at a time and read as integers, are multiplied by a number of their column in
    float64, and the bits of the products are summed in wrapping integer arithmetic, which gives one value
    whatever the order of summation. No step is arithmetic on the entries themselves, where a flushed
    subnormal would depend on the thread.
    """
    bits = features.detach().contiguous().view(_BITS[features.dtype])
    negative_zero = torch.iinfo(bits.dtype).min
    words = F.threshold(bits, negative_zero, 0).view(torch.int32)  # −0.0 equals 0.0
    # Roots, since no small multiples of them add up to the same; none is a multiple of another.
    columns = torch.arange(words.shape[1], dtype=torch.float64, device=words.device)
    factors = columns.add_(_FIRST_FACTOR).sqrt_()
    return (words * factors).view(torch.int64).sum(-1)
