"""How the row lists of a batch are computed: which matrices are kept, how many rows are taken at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["Plan", "choose_plan"]

_MIB = 2**20
_BUDGET = {"cpu": 64 * _MIB}
_BUDGET_ELSEWHERE = 1024 * _MIB
_CHUNK = {"cpu": 2**20}  # elements of one block of similarities that is multiplied out at once
_CHUNK_ELSEWHERE = 2**24
_FEWEST_ROWS = 128  # below it, reading and writing the gradients costs more than the product itself
_RANKED = {"cpu": 2**20}  # elements that are ranked at once: long enough to keep the cores busy
_SLICE = {"cpu": 2**18}  # elements that the running sums take at once: what a core's cache serves


@dataclass(frozen=True)
class Plan:
    """How row lists are computed; fixed by the sizes, the device and the options, so it can be asked before.

    Attributes:
        name: ``"rows"``: every chunk of rows is done with when its turn is over; twelve products of N×N×D in
            all, four for the similarities and eight for the gradients. ``"shared"``: the same product of two
            embeddings stands in S and in R, or twice in I or X; it is made once, kept until its mirror image
            comes, and its gradients likewise: six products.
        chunk_size: anchors of one product.
        ranked_size: anchors whose lists are ranked at once.
        slice_size: anchors whose running sums are taken at once.
        matrix_bytes: what is kept of whole matrices at the most: 0, or as much as one of N×N.
    """

    name: Literal["rows", "shared"]
    chunk_size: int
    ranked_size: int
    slice_size: int
    matrix_bytes: int


def choose_plan(
    anchors: int,
    items: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Plan:
    """Choose a plan.

    Args:
        anchors: how many rows have lists here.
        items: the length of a list.
        device: where the features are.
        dtype: of the arithmetic.
        chunk_size: anchors of one product; None chooses from the sizes and the device.
        memory_budget: bytes that matrices of the whole batch may take; None is 64 MiB on a CPU and 1 GiB
            elsewhere.

    Example:
        >>> choose_plan(4096, 4096, torch.device("cpu"), torch.float32)
        Plan(name='shared', chunk_size=256, ranked_size=256, slice_size=64, matrix_bytes=67108864)
        >>> choose_plan(8192, 8192, torch.device("cpu"), torch.float32).name
        'rows'
    """
    if memory_budget is None:
        memory_budget = _BUDGET.get(device.type, _BUDGET_ELSEWHERE)
    if chunk_size is None:
        chunk_size = max(_FEWEST_ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // items)
    chunk_size = min(chunk_size, anchors)
    ranked_size = max(1, min(chunk_size, _RANKED.get(device.type, _CHUNK_ELSEWHERE) // items))
    slice_size = max(1, min(ranked_size, _SLICE.get(device.type, _CHUNK_ELSEWHERE) // items))
    matrix_bytes = items * items * dtype.itemsize
    shares = anchors == items and matrix_bytes <= memory_budget
    name: Literal["rows", "shared"] = "shared" if shares else "rows"
    return Plan(name, chunk_size, ranked_size, slice_size, matrix_bytes if shares else 0)
