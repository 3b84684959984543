r"""A block of ranked lists on a GPU: the Python side of the kernels.

Each program of a launch takes rows in turns and has scratch for one row, so that of ``[n, N]`` only the two
blocks of cosines and the gradient exist.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import operator
import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from rankloss import lists
from rankloss.lists import Block, Evaluated
from rankloss.operators import register
from rankloss.options import RankOptions

__all__ = [
    "CACHE",
    "EARLIEST_TRITON",
    "LARGEST_LIST",
    "Launch",
    "choose_launch",
    "evaluate",
    "evaluate_rows",
    "triton_version",
    "why_not",
]

LARGEST_LIST = 2**17
"""The most items of a list, and the most bins: sums of integers in the kernels are made for no more."""

EARLIEST_TRITON = "3.4"
"""In the interpreter of earlier ones the kernels corrupt memory."""

CACHE = 50 * 2**20
"""Bytes of the last cache where a GPU's own is not known: an H100's."""

_DEEPEST = 64  # bucket mates that an item is compared with before its bucket is sorted by merging instead
_WARPS = 16  # per multiprocessor, whose 65,536 registers give 128 to each thread then
_SHORT_LIST = (
    2048  # items; longer lists have one program per multiprocessor, so that its scratch stays in cache
)
# Entries of a row taken at a time, and of them per warp: what the registers hold, by Triton's own assembler.
_BLOCK_OF_SORT, _BLOCK_OF_SHORT_SORT, _LEAST_BLOCK_OF_SORT, _PER_WARP_OF_SORT = 1024, 512, 128, 64
_BLOCK_OF_BIN, _BLOCK_OF_SHORT_BIN, _PER_WARP_OF_BIN = 2048, 1024, 128
_INTERPRETED_BLOCK = 128  # small, so that short lists have several blocks in the tests as well


def why_not(options: RankOptions, device: torch.device, dtype: torch.dtype, n: int, N: int) -> str | None:
    """Why the kernels do not serve a case; None where they do.

    Nothing is imported, launched or copied to find out.

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
    if options.is_dense:
        return f"{options!r} is computed from whole matrices"
    if options.model != "plackett_luce":
        return f"model={options.model!r} has no kernel"
    if options.method == "bin" and options.bins > LARGEST_LIST:
        return f"the kernels take up to {LARGEST_LIST:,} bins, not {options.bins:,}"
    if dtype != torch.float32:
        return f"the kernels compute in float32, not in {str(dtype).removeprefix('torch.')}"
    if n < 1 or not 2 <= N <= LARGEST_LIST:
        return f"the kernels take lists of 2 to {LARGEST_LIST:,} items; these have {N:,}"
    if not interpreted() and device.type != "cuda":
        return f"the kernels run on CUDA, not on {device.type}"
    triton = triton_version()
    if triton is None:
        return "Triton is not installed"
    if TorchVersion(triton) < EARLIEST_TRITON:
        return f"the kernels need Triton {EARLIEST_TRITON} or later; {triton} is installed"
    if interpreted() and device.type not in ("cpu", "meta"):
        return f"TRITON_INTERPRET=1 takes CPU tensors, not {device.type}"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_version() -> str | None:
    """The version of the Triton that is installed, None without one; it is not imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def evaluate(block: Block, options: RankOptions, _: int, *, with_gradient: bool) -> Evaluated:
    """What :func:`rankloss.lists.evaluate` gives, in one launch; lists that are not ranked stay there."""
    if block.beta is None:
        return lists.evaluate(block, options, len(block.cosines[0]), with_gradient=with_gradient)
    matrices, n, _N = block.cosines.shape
    alpha, beta = (None if w is None else w.repeat_interleave(n) for w in (block.alpha, block.beta))
    of_first, of_last = block.first_equal[0], block.first_equal[-1]
    assert beta is not None
    cross_entropy, nll, gradient = evaluate_rows(
        block.cosines.flatten(0, 1),
        (block.cosines if block.reference is None else block.reference).flatten(0, 1),
        block.scale,
        beta,
        alpha=alpha,
        first_row=block.first_row,
        anchors=n,
        opposite=block.reference is None,
        first_equal=None if of_first is None or of_last is None else torch.stack([of_first, of_last]),
        method=options.method,
        bins=options.bins,
        top_k=options.top_k,
        diagonal=options.diagonal,
        mean=options.reduction == "mean",
        gradient=with_gradient,
    )
    shape = (matrices, n)
    return Evaluated(
        None if cross_entropy is None else cross_entropy.view(shape).double(),
        nll.view(shape).double(),
        None if gradient is None else gradient.view(block.cosines.shape),
    )


def evaluate_rows(
    cosines: Tensor,
    reference: Tensor,
    scale: Tensor,
    beta: Tensor,
    *,
    alpha: Tensor | None = None,
    first_row: int = 0,
    anchors: int | None = None,
    opposite: bool = False,
    first_equal: Tensor | None = None,
    method: Literal["sort", "bin"] = "sort",
    bins: int = 640,
    top_k: int | None = None,
    diagonal: bool = True,
    mean: bool = False,
    gradient: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    r"""Cross-entropy, Plackett–Luce NLL and the gradient of their weighted sum, for a block of rows.

    With x = s·c a row's scores, k its own column, y its reference and μ 1 for the items that count, else 0,

        CE = log Σ_q e^{x_q} − x_k,   NLL = Σ_p μ_p·(log C_p − x_p),   C_p = Σ_{q : y_q ≤ y_p} e^{x_q},

        ∂(α·CE + β·NLL)/∂x_q = α·(e^{x_q} / Σ_p e^{x_p} − [q = k])
                               + β·(e^{x_q}·Σ_{p : y_p ≥ y_q} μ_p / C_p − μ_q).

    Everything is computed in float32; sums are pairs of a mantissa and an exponent, so that no span of scores
    overflows or underflows them. The result is the same in every bit from run to run. A row that holds NaN,
    infinity, or more than 10³⁸, is NaN throughout; other rows are not touched by it. Nothing waits for the
    device.

    Args:
        cosines: ``[n, N]``, float32, c; the columns are contiguous, the rows may be a stride apart.
        reference: ``[n, N]``, float32, y, likewise.
        scale: ``[]``, s, on the device.
        beta: ``[]`` or ``[n]``, floating point, the weight of the NLL.
        alpha: likewise that of the cross-entropy; None leaves it out.
        first_row: the first row's own column; the next row's is the next.
        anchors: after how many rows the own columns begin again at ``first_row``, where the block holds rows
            of several matrices one below the other; None where it holds those of one.
        opposite: whether the lists of the first matrix are ranked by the rows of the last one in
            ``reference``, those of the second by the last but one, and so on. ``reference`` may then be
            ``cosines`` itself, and each row is then read once for both of its lists.
        first_equal: ``[N]``, integer: y_q is read at ``first_equal[q]``, the first item equal to q, so that
            equal items are tied whatever the rounding of their cosines. None where no two are equal.
            ``[2, N]``: one for the first half of the rows, one for the second.
        method: ``"sort"``: the exact order of y. ``"bin"``: the items of a bin of
            :func:`rankloss.ranking.quantize` are tied.
        bins: their number, at least 2.
        top_k: see :func:`rankloss.plackett_luce_nll`.
        diagonal: whether the own column is an item of the ranked list; it is always one of the cross-entropy.
        mean: whether every row's NLL, and with it β, is divided by the row's Σ_p μ_p.
        gradient: whether it is wanted.

    Returns:
        CE ``[n]`` (None without alpha), NLL ``[n]`` and the gradient by x, ``[n, N]`` (None if not wanted).

    Raises:
        ValueError: for shapes, dtypes, strides or devices other than these; the message names the argument.

    Example:
        >>> c = torch.zeros(1, 4, device="meta")  # on a GPU the same call computes
        >>> one = torch.ones((), device="meta")
        >>> cross_entropy, nll, gradient = evaluate_rows(c, c, one, one, alpha=one)
        >>> nll.shape, gradient.shape
        (torch.Size([1]), torch.Size([1, 4]))
    """
    n, N = _check_rows(cosines, reference)
    anchors = _check_anchors(n, N, first_row, anchors)
    matrices = n // anchors if n else 2
    if matrices % 2 and (opposite or (first_equal is not None and first_equal.dim() > 1)):
        raise ValueError(
            f"opposite, and first_equal of shape [2, N], need an even number of matrices; got {matrices}"
        )
    _check_tensors(cosines, n, N, scale=scale, beta=beta, alpha=alpha, first_equal=first_equal)
    if method not in ("sort", "bin"):
        raise ValueError(f"method must be one of 'sort', 'bin'; got {method!r}")
    if method == "bin" and not 2 <= bins <= LARGEST_LIST:
        raise ValueError(f"bins must be from 2 to {LARGEST_LIST:,}; got {bins}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    cross_entropy, nll, slopes = torch.ops.rankloss.evaluate_rows(
        cosines, reference, scale, beta, alpha, first_equal, first_row, anchors, opposite,
        bins if method == "bin" else 0, top_k or 0, diagonal, mean, gradient,
    )  # fmt: skip
    return cross_entropy if alpha is not None else None, nll, slopes if gradient else None


def _check_rows(cosines: Tensor, reference: Tensor) -> tuple[int, int]:
    for name, x in (("cosines", cosines), ("reference", reference)):
        if x.dim() != 2 or x.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 [n, N]; got {x.dtype} {tuple(x.shape)}")
        if x.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous columns; got strides {x.stride()}")
    if cosines.shape != reference.shape or cosines.device != reference.device:
        raise ValueError(
            "cosines and reference must have one shape and device; "
            f"got {tuple(cosines.shape)} on {cosines.device}, {tuple(reference.shape)} on {reference.device}"
        )
    n, N = cosines.shape
    if not 2 <= N <= LARGEST_LIST:
        raise ValueError(f"cosines must have 2 to {LARGEST_LIST:,} columns; got {N:,}")
    return n, N


def _check_anchors(n: int, N: int, first_row: int, anchors: int | None) -> int:
    anchors = n if anchors is None else anchors
    if n and (anchors < 1 or n % anchors):
        raise ValueError(f"anchors must divide the number of rows, {n}; got {anchors}")
    if not 0 <= first_row <= N - anchors:
        raise ValueError(
            f"first_row must be from 0 to {N - anchors}, so that own columns exist; got {first_row}"
        )
    return anchors


def _check_tensors(cosines: Tensor, n: int, N: int, **tensors: Tensor | None) -> None:
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {"scale": ((),), "first_equal": ((N,), (2, N))}
    for name, x in tensors.items():
        if x is None:
            continue
        allowed = shapes.get(name, ((), (n,)))
        if tuple(x.shape) not in allowed or x.device != cosines.device:
            expected = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(
                f"{name} must have shape {expected} on {cosines.device}; got {tuple(x.shape)} on {x.device}"
            )
        integer = name == "first_equal"
        if x.is_floating_point() == integer or x.dtype == torch.bool:
            raise ValueError(f"{name} must be {'integer' if integer else 'floating point'}; got {x.dtype}")


class Launch(NamedTuple):
    """The shape of a launch.

    Attributes:
        programs: how many run; each takes every so many-th anchor, and all of its lists.
        block: entries of a row that a program works on at a time.
        warps: of a program.
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
        return self.programs * (4 * self.floats + 4 * self.ints + 8 * self.longs)


def choose_launch(n: int, N: int, bins: int, processors: int, cache: int = CACHE) -> Launch:
    """The launch for n anchors with lists of N items.

    ``bins`` is 0 for the exact order; ``processors`` is the GPU's multiprocessors, 0 for the interpreter;
    ``cache`` the bytes of its last cache. Up to half of the multiprocessors stay without a program where what
    the others read again then fits into the cache, since memory would otherwise see all of it.

    Example:
        >>> choose_launch(1024, 8192, 0, 132)
        Launch(programs=132, block=1024, warps=16, floats=16384, ints=32769, longs=0)
    """
    short, fitting = N <= _SHORT_LIST, 1 << (N - 1).bit_length()
    if bins:
        block = _BLOCK_OF_SHORT_BIN if short else _BLOCK_OF_BIN
        warps = block // _PER_WARP_OF_BIN
    else:
        block = max(_LEAST_BLOCK_OF_SORT, min(fitting, _BLOCK_OF_SHORT_SORT if short else _BLOCK_OF_SORT))
        warps = block // _PER_WARP_OF_SORT
    programs = processors * (_WARPS // warps)
    if not processors:
        block, warps, programs = min(_INTERPRETED_BLOCK, fitting), 1, 2
    scratch = (2 * bins, 2 * bins, bins) if bins else (2 * N, 4 * N + 1, 0)
    fitting_programs = cache // (8 * N + sum(map(operator.mul, scratch, (4, 4, 8))))
    if max(1, processors // 2) <= fitting_programs < programs:
        programs = fitting_programs
    return Launch(min(n, programs), block, warps, *scratch)


@functools.cache
def _processors_and_cache(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, CACHE
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "L2_cache_size", CACHE)


def _evaluate_rows(
    cosines: Tensor,
    reference: Tensor,
    scale: Tensor,
    beta: Tensor,
    alpha: Tensor | None,
    first_equal: Tensor | None,
    first_row: int,
    anchors: int,
    opposite: bool,
    bins: int,
    top_k: int,
    diagonal: bool,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, N = cosines.shape
    cross_entropy, nll, slopes = _outputs(cosines, alpha, gradient)
    if n == 0:
        return cross_entropy, nll, slopes
    launch = choose_launch(anchors, N, bins, *_processors_and_cache(cosines.device))
    if first_equal is not None:
        first_equal = first_equal.contiguous()
    scratch = [
        cosines.new_empty(launch.programs * size, dtype=dtype)
        for size, dtype in (
            (launch.floats, torch.float32),
            (launch.ints, torch.int32),
            (launch.longs, torch.int64),
        )
        if size
    ]
    equal_step = 0 if first_equal is None or first_equal.dim() == 1 else N
    tensors = (cosines, reference, first_equal, slopes, cross_entropy, nll, *scratch, scale, alpha, beta)
    sizes = (
        n, N, first_row, anchors, equal_step, cosines.stride(0), reference.stride(0),
        0 if alpha is None else _stride(alpha), _stride(beta), top_k or N, bins or N,
    )  # fmt: skip
    options = {
        "BLOCK": launch.block,
        "HAS_EQUAL": first_equal is not None,
        "OPPOSITE": opposite,
        "HAS_ALPHA": alpha is not None,
        "HAS_GRADIENT": gradient,
        "DIAGONAL": diagonal,
        "WEIGHS": top_k > 0,
        "MEAN": mean,
        "num_warps": launch.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(cosines):
        if bins:
            from rankloss.kernels.device.binned_rows import binned_rows

            binned_rows[(launch.programs,)](*tensors, *sizes, **options)
        else:
            from rankloss.kernels.device.sorted_rows import sorted_rows

            sorted_rows[(launch.programs,)](*tensors, *sizes, DEEPEST=_DEEPEST, **options)
    return cross_entropy, nll, slopes


def _stride(weight: Tensor) -> int:
    return weight.stride(0) if weight.dim() else 0


def _evaluate_rows_fake(cosines: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(cosines, rest[3], rest[-1])


def _outputs(cosines: Tensor, alpha: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, N = cosines.shape
    return (
        cosines.new_empty(0 if alpha is None else n),
        cosines.new_empty(n),
        cosines.new_empty((n, N) if gradient else (0, 0)),
    )


_SCHEMA = (
    "(Tensor cosines, Tensor reference, Tensor scale, Tensor beta, Tensor? alpha, Tensor? first_equal, "
    "int first_row, int anchors, bool opposite, int bins, int top_k, bool diagonal, bool mean, "
    "bool gradient) -> (Tensor, Tensor, Tensor)"
)
register("evaluate_rows", _SCHEMA, _evaluate_rows, _evaluate_rows_fake)
