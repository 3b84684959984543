"""How a batch is computed: what follows from the options, the sizes and the device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rankloss.options import RankOptions

# Entries of a matrix that is multiplied out at a time, and of the lists that are evaluated at once, as many
# as a core's cache holds.
_CHUNK, _CHUNK_ELSEWHERE = {"cpu": 2**20}, 2**24
_LISTS, _LISTS_ELSEWHERE = {"cpu": 2**17}, 2**23
# Below these, what is done once per chunk or per operation costs more than its product and its lists.
_FEWEST_ROWS, _FEWEST_LISTS = 128, 64
# Up to so many entries, products wait for their mirror images, which take 4 bytes each at most; and in no
# more than so many chunks, since the blocks that wait are as many as the chunks squared.
_MIRRORED, _MOST_CHUNKS = 2**24, 16


@dataclass(frozen=True)
class Plan:
    """How a batch is computed.

    Attributes:
        name: ``"rows"``: in chunks of rows, each of which is discarded once processed; memory grows with N.
            ``"dense"``: as whole matrices of N×N, which is how options are computed that do not stream.
        chunk_size: anchors of one product; under ``"dense"`` all of them.
        is_mirrored: whether entries that stand twice in the matrices are multiplied out once.
        lists_at_once: how many lists are ranked and summed at once.
        kernel: what ranks and sums the lists: ``"torch"``'s operations, or the fused kernel in ``"triton"``.
    """

    name: Literal["rows", "dense"]
    chunk_size: int
    is_mirrored: bool
    lists_at_once: int
    kernel: Literal["torch", "triton"]


def make_plan(
    options: RankOptions, anchors: int, items: int, device: torch.device, dtype: torch.dtype
) -> Plan:
    """How lists of these sizes are computed.

    Args:
        options: of the rank terms.
        anchors: how many rows have lists here.
        items: the length of a list.
        device: where the features are.
        dtype: of the arithmetic.

    Raises:
        ValueError: for ``kernel="triton"`` where it does not serve; the message says why.

    Example:
        >>> plan = make_plan(RankOptions(), 4096, 4096, torch.device("cpu"), torch.float32)
        >>> plan.name, plan.chunk_size, plan.lists_at_once, plan.kernel
        ('rows', 256, 64, 'torch')
        >>> make_plan(RankOptions(lists="batch"), 64, 64, torch.device("cpu"), torch.float32).name
        'dense'
    """
    if options.kernel == "triton":
        reason = kernels().why_not(options, device, dtype, anchors, items)
        if reason is not None:
            raise ValueError(f"kernel='triton' does not serve here: {reason}")
    chunk_size = max(_FEWEST_ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // items)
    chunk_size = anchors if options.is_dense else min(options.chunk_size or chunk_size, anchors)
    return Plan(
        name="dense" if options.is_dense else "rows",
        chunk_size=chunk_size,
        is_mirrored=anchors == items and anchors**2 <= _MIRRORED and anchors <= _MOST_CHUNKS * chunk_size,
        lists_at_once=max(_FEWEST_LISTS, _LISTS.get(device.type, _LISTS_ELSEWHERE) // items),
        kernel=options.kernel,
    )


def kernels() -> Any:
    """The package :mod:`rankloss_triton`, which computes ``kernel="triton"``.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        return importlib.import_module("rankloss_triton")
    except ModuleNotFoundError as error:
        raise ValueError("kernel='triton' does not serve here: rankloss_triton is not installed") from error
