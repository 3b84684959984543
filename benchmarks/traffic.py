"""Launches, bytes and live memory of the rank losses' two passes on a GPU, counted without one.

The loss is called on tensors without data that say they are on CUDA, so that it takes its GPU's way. Each
operation counts as one launch, and moves what it reads and writes: every operand once, of a gathered one as
much as comes out. A kernel of ours moves what :mod:`kernel_traffic` counts. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import rankloss
from kernel_traffic import feature_bytes, traffic
from one_of import one_of
from rankloss_triton import launching, rows

CACHE, PROCESSORS = 50 * 2**20, 132  # an H100's
_CUDA, _META = torch.device("cuda", 0), torch.device("meta")

_FACTORIES = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class AsCuda(TorchFunctionMode):
    """Tensors on the meta device say that they are on CUDA, and what asks for CUDA gets the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            device = func(*args)
            return _CUDA if device.type == "meta" else device
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].device.type in ("meta", "cuda")
        args, kwargs = tree_map(_to_meta, (tuple(args), dict(kwargs or {})))
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = _to_meta(torch.device(kwargs["device"]))
        return func(*args, **kwargs)


def _to_meta(x: Any) -> Any:
    """The meta device for a device of CUDA; all else as it is."""
    return _META if isinstance(x, torch.device) and x.type == "cuda" else x


class Count(TorchDispatchMode):
    """Counts what reaches the GPU; operators of rankloss are counted by the operations inside them.

    Args:
        inputs: The tensors that are there before, which the added peak leaves out.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.host_copies: Counter[str] = Counter()
        self._live: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self.peak = 0
        self._track(inputs)
        self._before = self.peak

    @property
    def added_peak(self) -> int:
        """The most bytes that were live at once, beyond the inputs."""
        return self.peak - self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # counted by what it is made of
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        self._track(x for x in outputs if _on_gpu(x))
        are_on_gpu = [_on_gpu(x) for x in (*_tensors((args, kwargs)), *outputs)]
        launches_nothing = func.is_view or name in _ALLOCATIONS
        if any(are_on_gpu) and not launches_nothing:
            operation = name.rstrip("_")  # whether in place or not
            if operation in ("_to_copy", "copy") and not all(are_on_gpu):
                self.host_copies[str(func)] += 1
            self._add(operation, _moved(func, args, kwargs, outputs))
        return result

    def _add(self, operation: str, moved: int) -> None:
        """Count a launch that moves so many bytes."""
        self.launches[operation] += 1
        self.bytes[operation] += moved

    def launch(self, name: str, _: int, tensors: Sequence[Tensor], *sizes: int, **options: Any) -> None:
        """Count a kernel in place of :func:`rankloss_triton.launching.launch`."""
        if name.startswith("equal_rows"):  # no two rows of a batch without data are equal
            _, _, kernel = name.partition(".")
            self._add("kernel", feature_bytes(kernel, tensors[0]))
            return
        lists, items, _first_row, anchors, _top_k, divisions = sizes  # as rankloss_triton.rows gives them
        _cosines, _reference, first_equal, *_ = tensors
        moved = traffic(
            lists, items,
            bins=divisions if name.startswith("binned") else 0,
            processors=PROCESSORS,
            cache=CACHE,
            index_bytes=first_equal.element_size(),
            matrices=lists // anchors,
            opposite=options["OPPOSITE"],
        )  # fmt: skip
        self._add("kernel", moved.from_memory(CACHE))

    def _track(self, tensors: Iterable[Tensor]) -> None:
        """Forget the storages that are freed, remember those of some tensors, and take the peak."""
        freed = [key for key, storage in self._live.items() if storage.expired()]
        for key in freed:
            del self._live[key], self._sizes[key]
        for x in tensors:
            storage = x.untyped_storage()
            if storage._cdata not in self._live:
                self._live[storage._cdata] = StorageWeakRef(storage)
                self._sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in arguments or results."""
    leaves, _ = tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _on_gpu(x: Tensor) -> bool:
    """True for a tensor on the meta device, which stands for CUDA here."""
    return x.device.type != "cpu"


def _footprint(x: Tensor) -> int:
    """Bytes of the entries of a tensor, each of them once where it is expanded."""
    entries = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        entries *= size if stride else min(size, 1)
    return entries * x.element_size()


def _moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name in _FACTORIES:  # which take an operand for its shape
        return sum(map(_footprint, outputs))
    read, written = _operands(func, args, kwargs)
    read = _without_views_of_the_same(filter(_on_gpu, read))
    if name in ("gather", "index", "index_select"):  # of the first operand as much as comes out
        return sum(map(_footprint, read[1:])) + 2 * sum(map(_footprint, outputs))
    if name in ("scatter", "scatter_add", "scatter_reduce", "index_put", "index_add"):
        index, *_ = (x for x in read if not x.is_floating_point())
        touched = index.numel() * outputs[0].element_size()
        if name.endswith(("add", "reduce")):  # they read the entries that they write
            touched *= 2
        if written:  # in place
            return sum(map(_footprint, read)) + touched
        return sum(map(_footprint, read[1:])) + touched + 2 * _footprint(outputs[0])
    writes = sum(map(_footprint, written or outputs))
    # mul_ reads what it writes; copy_, fill_, an out= and a product with beta=0 do not.
    overwrites = name in ("copy", "fill", "zero") or "out" in kwargs or kwargs.get("beta") == 0
    if written and not overwrites:
        writes *= 2
    return sum(map(_footprint, read)) + writes


def _operands(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads alone, and those that it writes, by its schema."""
    arguments = func._schema.arguments
    values = list(zip(arguments, args, strict=False))  # the last ones are given by name, or not at all
    values += [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
    read: list[Tensor] = []
    written: list[Tensor] = []
    for argument, value in values:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (written if is_written else read).extend(_tensors(value))
    return read, written


def _without_views_of_the_same(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, of which views that begin at the same entry are one operand, the larger."""
    largest: dict[tuple[int, int], Tensor] = {}
    for x in tensors:
        beginning = (x.untyped_storage()._cdata, x.storage_offset())
        largest[beginning] = max(x, largest.get(beginning, x), key=_footprint)
    return list(largest.values())


def count(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Costs of one forward and backward pass; the bytes moved are per element of its four matrices."""
    v, t, *everyone, s = inputs  # everyone: the image and text features of all processes
    anchors, items = len(v), len(everyone[0])
    counter = Count(inputs)
    with (
        mock.patch.object(launching, "launch", counter.launch),
        mock.patch.object(rows, "processors_and_cache", return_value=(PROCESSORS, CACHE)),
        one_of(items // anchors, (v, t), everyone),
        counter,
        AsCuda(),
    ):
        loss(v, t, s).backward()
    elements = 4 * anchors * items
    return {
        "bytes_per_element": round(sum(counter.bytes.values()) / elements, 1),
        "launches": sum(counter.launches.values()),
        "peak_mib": round(counter.added_peak / 2**20, 1),
        "bytes_by_operation": {
            name: round(moved / elements, 1) for name, moved in counter.bytes.most_common()
        },
        "launches_by_operation": dict(counter.launches.most_common()),
        "copies_from_or_to_host": sum(counter.host_copies.values()),
    }


def features(rows: int, items: int, dim: int) -> list[Tensor]:
    """Local features, those of all processes (the same where rows = items, of one process), the scale."""
    local = [torch.empty(rows, dim, device="meta", requires_grad=True) for _ in range(2)]
    everywhere = local
    if rows < items:
        everywhere = [torch.empty(items, dim, device="meta", requires_grad=True) for _ in range(2)]
    return [*local, *everywhere, torch.empty((), device="meta", requires_grad=True)]


def measure(rows: int, items: int, dim: int) -> dict[str, Any]:
    """Counts of every implementation, by its name."""
    counts: dict[str, Any] = {"rows": rows, "items": items, "dim": dim}
    for kernel, method in itertools.product(("torch", "triton"), ("sort", "bin")):
        loss = rankloss.RankClipLoss(schedule="constant", method=method, kernel=kernel)
        counts[f"{kernel}-{method}"] = count(loss, features(rows, items, dim))
    return counts


def table(counts: dict[str, Any]) -> str:
    """The counts of :func:`measure` as Markdown."""
    heads = {
        "bytes_per_element": "bytes per element and list",
        "launches": "launches",
        "peak_mib": "peak MiB",
    }
    rows = [["", *heads.values()], ["---", *["---:"] * len(heads)]]
    for name, of_implementation in counts.items():
        if isinstance(of_implementation, dict):  # the sizes are numbers
            rows.append([name, *(f"{of_implementation[key]:,.0f}" for key in heads)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="of one process (default: %(default)s)")
    parser.add_argument("--items", type=int, default=8192, help="pairs of the batch (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.rows < 1 or args.items < 2 or args.items % args.rows:
        parser.error(f"--items must be a multiple of --rows; got {args.items} and {args.rows}")
    counts = measure(args.rows, args.items, args.dim)
    print(json.dumps(counts, indent=2) if args.json else table(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
