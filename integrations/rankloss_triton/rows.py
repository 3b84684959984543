"""A block of ranked lists on a GPU: the cases that are served, and the launch.

The programs of a launch stride over the anchors. Each has scratch for one row, so the only arrays of
``[n, N]`` entries are the cosines and the gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from rankloss.engine import Block, Evaluated
from rankloss.options import RankOptions
from rankloss_triton import launching

LARGEST_LIST = 2**17
"""The largest number of items of a list, and of bins, that the kernels' integer sums hold."""

CACHE = 50 * 2**20
"""Bytes of an H100's last cache, for GPUs whose own is unknown."""

_DEEPEST = 64  # bucket mates that an item is compared with before its bucket is sorted by merging instead
_WARPS = 16  # per multiprocessor, whose 65,536 registers give 128 to each thread then
# Items; longer lists have one program per multiprocessor, so that its scratch stays in cache.
_SHORT_LIST = 2048
# Entries of a row per step, and of them per warp: as many as the registers hold, by Triton's own assembler.
_BLOCK_OF_SORT, _BLOCK_OF_SHORT_SORT, _LEAST_BLOCK_OF_SORT, _PER_WARP_OF_SORT = 1024, 512, 128, 64
_BLOCK_OF_BIN, _BLOCK_OF_SHORT_BIN, _PER_WARP_OF_BIN = 2048, 1024, 128
_INTERPRETED_BLOCK = 128  # small, so that short lists have several blocks in the tests as well


def why_not(options: RankOptions, device: torch.device, dtype: torch.dtype, n: int, N: int) -> str | None:
    """The reason that the kernels do not serve a case; None where they do.

    Nothing is imported, launched or copied.

    Args:
        options: of the rank terms.
        device: of the cosines.
        dtype: of the cosines.
        n: rows of the matrix.
        N: items of each list.

    Example:
        >>> why_not(RankOptions(model="top_one"), torch.device("cuda"), torch.float32, 1024, 8192)
        "model='top_one' has no kernel"
    """
    if options.reduction == "none":
        return "reduction='none' is computed from whole matrices"
    if options.model != "plackett_luce":
        return f"model={options.model!r} has no kernel"
    if options.method == "bin" and options.bins > LARGEST_LIST:
        return f"the kernels take up to {LARGEST_LIST:,} bins, not {options.bins:,}"
    if dtype != torch.float32:
        return f"the kernels compute in float32, not in {str(dtype).removeprefix('torch.')}"
    if n < 1 or not 2 <= N <= LARGEST_LIST:
        return f"the kernels take one list or more, of 2 to {LARGEST_LIST:,} items; got {n:,} of {N:,}"
    if device.type == "xpu":
        return "the kernels were never run on XPU, whose programs have other sizes"
    if not launching.is_interpreted() and device.type != "cuda":
        return f"the kernels run on CUDA, not on {device.type}"
    triton = launching.triton_version()
    if triton is None:
        return "Triton is not installed"
    if TorchVersion(triton) < launching.EARLIEST_TRITON:
        return f"the kernels need Triton {launching.EARLIEST_TRITON} or later; {triton} is installed"
    if launching.is_interpreted() and device.type not in ("cpu", "meta"):
        return f"TRITON_INTERPRET=1 takes CPU tensors, not {device.type}"
    return None


def evaluate(block: Block, options: RankOptions, *, with_gradient: bool) -> Evaluated:
    """Cross-entropy, NLL and gradient of a block of ranked lists, in one launch.

    Scores, order and gradient are in float32. Sums are pairs of a mantissa and an exponent, so no span of
    scores overflows or underflows them. Two runs agree in every bit. A row that holds NaN, infinity or a
    number beyond 10³⁸ gives NaN, and no other row does. Nothing waits for the device.

    Args:
        block: float32 cosines of two or four matrices, whose lists are ranked (``beta`` is not
            None). ``first_equal`` is the same for all matrices of the first half, and for all of the second.
        options: those for which :func:`why_not` is None.
        with_gradient: False skips the gradient.

    Example:
        >>> c, one = torch.zeros(2, 1, 4, device="meta"), torch.ones(2, device="meta")
        >>> equal = torch.zeros(4, dtype=torch.int64, device="meta")
        >>> block = Block(c, one[0], one, one, None, (equal, equal), 0)  # on a GPU the same call computes
        >>> found = evaluate(block, RankOptions(), with_gradient=True)
        >>> found.nll.shape, found.gradient.shape
        (torch.Size([2, 1]), torch.Size([2, 1, 4]))
    """
    x = block.cosines.contiguous()
    matrices, anchors, N = x.shape
    assert block.beta is not None
    bins = options.bins if options.method == "bin" else 0
    processors, cache = processors_and_cache(x.device)
    launch = choose_launch(anchors, N, bins, processors, cache)
    cross_entropy = x.new_empty(matrices, anchors)
    nll = x.new_empty(matrices, anchors)
    gradient = x.new_empty(x.shape if with_gradient else 0)
    tensors = (
        x,
        x if block.reference is None else block.reference.contiguous(),  # with OPPOSITE the opposite matrix
        _first_equal_of_halves(block),
        gradient,
        cross_entropy,
        nll,
        *launch.new_scratch(x.device),
        block.scale,
        None if block.alpha is None else block.alpha.contiguous(),  # not expanded: read entry by entry
        block.beta.contiguous(),
    )
    flags: dict[str, Any] = {
        "BLOCK": launch.block,
        "OPPOSITE": block.reference is None,
        "HAS_ALPHA": block.alpha is not None,
        "HAS_GRADIENT": with_gradient,
        "DIAGONAL": options.diagonal,
        "WEIGHS": options.top_k is not None,
        "MEAN": options.reduction == "mean",
        "num_warps": launch.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    if not bins:
        flags["DEEPEST"] = _DEEPEST
    launching.launch(
        "binned_rows.binned_rows" if bins else "sorted_rows.sorted_rows",
        launch.programs,
        tensors,
        matrices * anchors,  # n
        N,
        block.first_row,
        anchors,
        options.top_k or N,  # without top_k all ranks count
        bins or N,  # the divisions of a row's range: bins, or as many buckets as items
        **flags,
    )
    return Evaluated(
        None if block.alpha is None else cross_entropy.to(block.beta.dtype),
        nll.to(block.beta.dtype),
        gradient if with_gradient else None,
    )


def _first_equal_of_halves(block: Block) -> Tensor:
    """``[2, N]``: the first item equal to each, for the first and for the second half of the matrices."""
    halves = []
    for first_equal in (block.first_equal[0], block.first_equal[-1]):
        if first_equal is None:  # each is equal to itself alone
            first_equal = torch.arange(block.cosines.shape[-1], device=block.cosines.device)
        halves.append(first_equal)
    return torch.stack(halves)


class Launch(NamedTuple):
    """The shape of a launch.

    Attributes:
        programs: their number; they stride over the anchors and take all lists of each.
        block: entries of a row per step of a program.
        warps: per program.
        floats: entries of float32 scratch per program.
        ints: entries of int32 scratch per program.
        longs: entries of int64 scratch per program.
    """

    programs: int
    block: int
    warps: int
    floats: int
    ints: int
    longs: int

    @property
    def scratch_bytes(self) -> int:
        """Scratch of all programs."""
        return self.programs * _scratch_bytes(self.floats, self.ints, self.longs)

    def new_scratch(self, device: torch.device) -> list[Tensor]:
        """The scratch of all programs, one tensor for each dtype that the kernel uses."""
        sizes = {torch.float32: self.floats, torch.int32: self.ints, torch.int64: self.longs}
        return [
            torch.empty(self.programs * size, dtype=dtype, device=device)
            for dtype, size in sizes.items()
            if size > 0
        ]


def _scratch_bytes(floats: int, ints: int, longs: int) -> int:
    """The bytes of a program's scratch, with so many entries."""
    return 4 * floats + 4 * ints + 8 * longs


def choose_launch(n: int, N: int, bins: int, processors: int, cache: int = CACHE) -> Launch:
    """The launch for n anchors with lists of N items.

    ``bins`` is 0 for the exact order; ``processors`` is the number of multiprocessors, 0 for the interpreter;
    ``cache`` is the size of the last cache in bytes. Up to half of the multiprocessors get no program if the
    rows and scratch of the others then fit into the cache.

    Example:
        >>> choose_launch(1024, 8192, 0, 132)
        Launch(programs=132, block=1024, warps=16, floats=16384, ints=32769, longs=0)
    """
    is_short = N <= _SHORT_LIST
    block_of_list = 1 << (N - 1).bit_length()  # the least power of two that holds a list
    if not processors:
        block, warps, programs = min(_INTERPRETED_BLOCK, block_of_list), 1, 2  # two share the anchors
    elif bins:
        block = _BLOCK_OF_SHORT_BIN if is_short else _BLOCK_OF_BIN
        warps = block // _PER_WARP_OF_BIN
        programs = processors * (_WARPS // warps)
    else:
        largest_block = _BLOCK_OF_SHORT_SORT if is_short else _BLOCK_OF_SORT
        block = max(_LEAST_BLOCK_OF_SORT, min(block_of_list, largest_block))
        warps = block // _PER_WARP_OF_SORT
        programs = processors * (_WARPS // warps)
    # The scratch of a program, as the kernels' docstrings count it; for the exact order in N buckets.
    floats, ints, longs = (2 * bins, 2 * bins, bins) if bins else (2 * N, 4 * N + 1, 0)
    bytes_of_rows = 8 * N  # of a row of cosines and one of the reference, in float32
    programs_in_cache = cache // (bytes_of_rows + _scratch_bytes(floats, ints, longs))
    if max(1, processors // 2) <= programs_in_cache < programs:
        programs = programs_in_cache
    return Launch(min(n, programs), block, warps, floats, ints, longs)


@functools.cache
def processors_and_cache(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, 0 for the interpreter, and the size of the last cache in bytes."""
    if device.type != "cuda":
        return 0, CACHE
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "L2_cache_size", CACHE)
