"""Which items are tied: within a sorted list, and among the rows of a batch.

Ties have to be exact for the loss to be independent of the order in which items arrive. A matrix product
does not give that for free: the columns of two identical captions can come out a rounding apart, because
the kernel sums edge columns in another order than the rest. So equal rows are recognised from their bits,
before any product is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_occurrence", "group_bounds", "row_hashes"]

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def group_bounds(sorted_values: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index, at every position, of the run of equal values that holds the position.

    Args:
        sorted_values: ``[..., N]``, sorted along the last dimension, in either direction.

    Returns:
        Two integer tensors of the same shape, ``first`` and ``last``.

    Example:
        >>> first, last = group_bounds(torch.tensor([1.0, 2.0, 2.0, 5.0]))
        >>> first.tolist(), last.tolist()
        ([0, 1, 1, 3], [0, 2, 2, 3])
    """
    n = sorted_values.shape[-1]
    index = torch.arange(n, device=sorted_values.device)
    edge = torch.ones_like(sorted_values[..., :1], dtype=torch.bool)
    change = sorted_values[..., 1:] != sorted_values[..., :-1]
    starts, ends = torch.cat([edge, change], -1), torch.cat([change, edge], -1)
    first = torch.where(starts, index, 0).cummax(-1).values
    last = torch.where(ends, index, n).flip(-1).cummin(-1).values.flip(-1)
    return first, last


def first_occurrence(features: Tensor) -> Tensor:
    """Index of the first row that equals row i, for every i.

    It is i itself where the row is the first of its kind. Rows are compared through a 64-bit hash in
    wrapping integer arithmetic, which gives one value whatever the order of summation, and each match is
    then confirmed on the values themselves. Memory is O(N·D), nothing is synchronised with the host, and a
    row that holds NaN equals no row.

    Args:
        features: ``[N, D]``, float32 or float64.

    Returns:
        Integer tensor of shape ``[N]``.

    Example:
        >>> first_occurrence(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
        [0, 1, 0]
    """
    n = len(features)
    hashes = row_hashes(features)
    sorted_hashes, order = hashes.sort(stable=True)  # stable: the first row of a group is its smallest index
    first, _ = group_bounds(sorted_hashes)
    candidate = torch.empty_like(order).scatter_(0, order, order.gather(0, first))
    same = (features.detach()[candidate] == features.detach()).all(-1)
    return torch.where(same, candidate, torch.arange(n, device=features.device))


def row_hashes(features: Tensor) -> Tensor:
    """A 64-bit hash of every row, ``[N]``; equal rows have equal ones."""
    bits = (features.detach() + 0.0).view(_BITS[features.dtype]).long()  # + 0.0 turns -0.0 into 0.0
    return (bits * _odd_multipliers(features.shape[1], features.device)).sum(-1)


def _odd_multipliers(count: int, device: torch.device) -> Tensor:
    """Well-mixed odd 64-bit integers, one a column (a multiply–xorshift mix of the column's number)."""
    h = torch.arange(1, count + 1, device=device) * -7046029254386353131
    h = (h ^ (h >> 30)) * -4658895280553007687
    h = (h ^ (h >> 27)) * -7723592293110705685
    return (h ^ (h >> 31)) | 1
