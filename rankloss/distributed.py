"""All-gather of embeddings with autograd, by the rules of open_clip's ClipLoss."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rankloss.checks import kind_of
from rankloss.options import check_choice, check_count
from rankloss.precision import can_be_read

__all__ = ["Gather", "GatherOption", "all_gather", "gather_once"]


def all_gather(x: Tensor, group: Any = None) -> Tensor:
    r"""Concatenate the tensors of all processes along dim 0, differentiably.

    The gradient is summed over the processes:

        y = [x_0; x_1; …; x_{W−1}],   ∂L/∂x_r = Σ_w ∂L_w/∂y[chunk r]

    so that the sum of the processes' losses is differentiated exactly, also repeatedly. Without a process
    group, or with a group of one process, ``x`` itself is returned.

    Args:
        x: ``[n, …]``, of one shape and dtype on all processes of the group.
        group: a process group; None for the default one.

    Returns:
        ``[W·n, …]``.

    Raises:
        ValueError: for a ``group`` that is no process group, or to which this process does not belong.

    Example:
        >>> all_gather(torch.ones(2, 3)).shape  # one process
        torch.Size([2, 3])
    """
    _check_group(group)
    if not _initialized() or dist.get_world_size(group) == 1:
        return x
    result: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _AllGather(torch.autograd.Function):
    """The rows of all processes; the gradients of this process's are summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad_outputs[0], ctx.group), None  # type: ignore[no-untyped-call]


class _ReduceScatter(torch.autograd.Function):
    """This process's chunk of the sum over the processes: the adjoint of :class:`_AllGather`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        # In float32 at least: a half-precision sum loses accuracy with the number of processes.
        dtype = torch.promote_types(y.dtype, torch.float32)
        if _has_tensor_collectives(y, group):
            terms = y.detach().to(dtype).contiguous()
            chunk = terms.new_empty(len(y) // dist.get_world_size(group), *y.shape[1:])
            # Since torch 2.13 the old name warns.
            reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            reduce_scatter(chunk, terms, group=group)
            return chunk.to(y.dtype)
        # Otherwise every process gets the whole sum, and keeps its chunk.
        total = y.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].to(y.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grad_outputs[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Total(torch.autograd.Function):
    """The sum over the processes, and of their gradients: its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad_outputs[0], ctx.group), None  # type: ignore[no-untyped-call]


def _total(x: Tensor, group: Any) -> Tensor:
    """The sum over the processes, without a gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gather(x: Tensor, group: Any) -> Tensor:
    """``[W·n, …]``, without a gradient."""
    x = x.detach().contiguous()
    world_size = dist.get_world_size(group)
    if _has_tensor_collectives(x, group):
        gathered = x.new_empty(world_size * len(x), *x.shape[1:])
        # Since torch 2.13 the old name warns.
        gather_into_one = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather_into_one(gathered, x, group=group)
        return gathered
    chunks = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(chunks, x, group=group)
    return torch.cat(chunks)


def _has_tensor_collectives(x: Tensor, group: Any) -> bool:
    """True if the backend gathers into, and reduces from, one tensor in every supported torch.

    Compared with an all_reduce this moves half the bytes; compared with a list of tensors it saves the
    concatenation. On a CPU the backend is gloo, reported under another name if it is combined with a device
    backend.
    """
    return not x.is_cpu and dist.get_backend(group) != "gloo"


def _initialized() -> bool:
    """True if there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def _check_group(group: Any) -> None:
    """Raise a ValueError for what is no process group, or one that this process is not in."""
    # Outside the group, new_group() returns a sentinel instead of a ProcessGroup.
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"group must be a process group that this process belongs to; got {group!r}")


# --- agreement of the processes -----------------------------------------------------------------------------

_agreed: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()
"""By owner: the descriptions that all processes had at the same call, of features on an accelerator."""

_RAISED_BY_ALL = {kind.__name__: kind for kind in (ValueError, TypeError)}
"""The errors of arguments by name; another error of one process is a RuntimeError of all."""


def _gather_text(text: str, device: torch.device, group: Any) -> list[str]:
    """The texts of all processes, by way of a device: a process may train on another than CUDA's current.

    Tensors of one shape alone can be gathered, so shorter texts are padded: of "ab" and "abc" the sizes are
    2 and 3, and the rows 97 98 0 and 97 98 99.
    """
    contents = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(contents)], device=device)
    sizes = _gather(size, group).tolist()
    longest = max(sizes)
    padded = F.pad(contents, (0, longest - len(contents)))
    rows = _gather(padded, group).view(len(sizes), longest).tolist()
    texts = []
    for row, length in zip(rows, sizes, strict=True):
        texts.append(bytes(row[:length]).decode())
    return texts


class ProcessPlace(NamedTuple):
    """A process's rank in its group, and the number of processes."""

    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Gathering of features from other processes, with the argument names of open_clip's ClipLoss.

    With both flags the gradient after DDP's averaging is exactly that of the whole batch in one process, and
    each process computes its own rows only. This is the default of every loss (``gather=None``), over the
    default process group. Build a ``Gather`` to change the flags or the group. Every process of the group
    must call the loss, with features of the same shape; if only one process evaluates a loss, it needs
    ``gather=False``.

    Args:
        local_loss: compute the rows of this process only, against the columns of all processes.
        gather_with_grad: pass the gradient on to every process. Without it other processes' features are
            constants; this process's features keep their gradient, with ``local_loss`` only as rows.
        rank: this process's rank in the group; None reads it from the group.
        world_size: the group's size; None reads it from the group. 1 without a group gathers nothing,
            whatever the default group holds.
        group: the process group of the batch; None for the default one. Rank and size are read lazily, so the
            default group may be initialised after the loss is built. Without a group, one process is assumed.

    Raises:
        ValueError: for a flag that is not a bool; unless rank and size are integers with 0 ≤ rank <
            world_size; if they differ from this process's rank in the group and the group's size, which is
            seen at once with a ``group``, and at the first call with the default one; for a group that is not
            a process group, or excludes this process.

    Example:
        >>> Gather(local_loss=False).place  # no process group
        ProcessPlace(rank=0, world_size=1)
    """

    local_loss: bool = True
    gather_with_grad: bool = True
    rank: int | None = None
    world_size: int | None = None
    group: Any = None

    def __post_init__(self) -> None:
        for flag in ("local_loss", "gather_with_grad"):
            check_choice(flag, getattr(self, flag), (True, False))
        for count, at_least in (("rank", 0), ("world_size", 1)):
            value = getattr(self, count)
            if value is not None:
                object.__setattr__(self, count, check_count(count, value, at_least=at_least))
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ValueError(
                f"rank must be less than world_size; got rank={self.rank}, world_size={self.world_size}"
            )
        _check_group(self.group)
        if self.group is not None:
            _ = self.place  # which checks rank and size

    def __deepcopy__(self, memo: Any) -> Gather:
        return self  # immutable, and a process group cannot be copied

    @classmethod
    def of(cls, gather: GatherOption) -> Gather:
        """The ``Gather`` of a loss's argument ``gather``: None for the default, False for no gathering.

        Raises:
            ValueError: for anything else that is not a :class:`Gather`.
        """
        if gather is None:
            return cls()
        if gather is False:
            return cls(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
        if not isinstance(gather, Gather):
            raise ValueError(
                "gather must be None (the default process group), False (this process's pairs only) or a "
                f"rankloss.Gather; got {gather!r}"
            )
        return gather

    @property
    def place(self) -> ProcessPlace:
        """This process's rank and the number of processes: the group's, or the given ones without a group.

        Raises:
            ValueError: if the group's differ from the given ones: the loss would be plausible but wrong.
        """
        gathers_nothing = self.world_size == 1 and self.group is None  # whatever the default group holds
        if not _initialized() or gathers_nothing:
            return ProcessPlace(self.rank or 0, self.world_size or 1)
        rank = dist.get_rank(self.group)
        size = dist.get_world_size(self.group)
        if self.rank not in (None, rank) or self.world_size not in (None, size):
            raise ValueError(
                f"this process has rank {rank} of {size} in its process group; "
                f"got rank={self.rank!r}, world_size={self.world_size!r}"
            )
        return ProcessPlace(rank, size)

    @property
    def anchors_are_local(self) -> bool:
        """True if this process computes its own rows only."""
        return self.local_loss and self.place.world_size > 1

    def first_row(self, rows: int) -> int:
        """The column of the first of this process's ``rows``; 0 if all rows are computed."""
        return self.place.rank * rows if self.anchors_are_local else 0

    def agreement(
        self, owner: object, *further: str, **features: Tensor | None
    ) -> AbstractContextManager[None]:
        """A context for the checks of a call, in which an error of one process is raised on all.

        Enter it before gathering, with all features of the call by name, including a teacher's, and None for
        missing ones. Checks inside the block run on each process, without collectives. On exit the processes
        exchange their errors, and descriptions of the call (names, dtypes, shapes, gradients, flags). All
        raise the first error found, or a ValueError if the descriptions differ. So no process waits for one
        that has stopped, provided that all run the same program.

        On a CPU this is one reduction of three numbers per call, among them a hash of the description, and
        more only if a process has an error or the hashes differ. On an accelerator, whose host would wait at
        each call, only descriptions that are new for ``owner`` are exchanged, with the errors of that call.
        While the descriptions of an owner are equal call by call, all processes remember the same ones. After
        an error nothing is remembered.

        Not detected: on an accelerator, once a description has been compared, an error or another description
        on some processes alone; NCCL then waits until its timeout. Anywhere, an error before the call of the
        loss, or a call without any tensor, on some processes alone. In a captured graph nothing is compared.

        Args:
            owner: the gathering loss, or any object that supports weak references.
            *further: the names of inputs that another loss will compare.
            **features: by name; the first tensor's device carries the exchange.

        Raises:
            ValueError: if the processes differ; it shows rank 0's features and the first that differ.
            Exception: an error raised inside, on several processes with the rank that has it.

        Example:
            >>> with Gather().agreement(object(), grades=torch.ones(2)):  # one process: changes no error
            ...     pass
        """
        tensors = [x for x in features.values() if isinstance(x, Tensor)]
        # Without a process group the gathering raises an error; without a tensor the call's checks do.
        has_others_to_ask = self.place.world_size > 1 and _initialized()
        can_ask = len(tensors) > 0 and can_be_read(tensors[0])
        if not (has_others_to_ask and can_ask):
            return contextlib.nullcontext()
        return self._exchange(owner, further, features, tensors[0].device)

    @contextlib.contextmanager
    def _exchange(
        self,
        owner: object,
        further: tuple[str, ...],
        features: dict[str, Tensor | None],
        device: torch.device,
    ) -> Iterator[None]:
        """The context of :meth:`agreement`, for several processes, by way of a device."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        description = self._description(features, further)
        # All processes take the same branch: by one reduction, or by the descriptions that all remember.
        if device.type == "cpu":
            is_exchanged = self._has_error_or_difference(error, description)
        else:
            is_exchanged = description not in _agreed.get(owner, ())
        if not is_exchanged:
            if error is not None:  # on an accelerator: of this process, with features compared before
                raise error
            return
        name_and_message = None if error is None else [type(error).__name__, str(error)]
        texts = _gather_text(json.dumps([description, name_and_message]), device, self.group)
        descriptions, errors = zip(*(json.loads(text) for text in texts), strict=True)  # by rank
        for rank, error_of_rank in enumerate(errors):
            if error_of_rank is not None:
                name, message = error_of_rank
                raised_by_all = _RAISED_BY_ALL.get(name, RuntimeError)
                raise raised_by_all(f"{message} (on rank {rank} of {len(errors)})") from error
        first = descriptions[0]
        for rank, other in enumerate(descriptions):
            if other != first:
                raise ValueError(
                    "all processes must give features of the same names, dtypes, shapes and gradients; got "
                    f"{first} on rank 0, but {other} on rank {rank}"
                )
        _agreed.setdefault(owner, set()).add(description)

    def _description(self, features: dict[str, Tensor | None], further: tuple[str, ...]) -> str:
        """The features and the flags of a call in words."""
        # Processes must agree on gradients where the backward pass has collectives: with gather_with_grad
        # that of `items`, with local_loss=False that of `total`, even without gather_with_grad. Only
        # local_loss without gather_with_grad has none.
        backward_has_collectives = self.gather_with_grad or not self.local_loss
        gradients_must_agree = backward_has_collectives and torch.is_grad_enabled()
        words = []
        for name, feature in features.items():
            if isinstance(feature, Tensor):
                gradient = " with a gradient" if feature.requires_grad and gradients_must_agree else ""
                words.append(f"{name} {feature.dtype} {list(feature.shape)}{gradient}")
            elif feature is not None:
                words.append(f"{name} {kind_of(feature)}")
        flags = f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}"
        return ", ".join([*words, *further, flags]).replace("torch.", "")

    def _has_error_or_difference(self, error: Exception | None, description: str) -> bool:
        """True if a process has an error, or the processes' descriptions differ; one reduction on a CPU."""
        digest = hashlib.blake2b(description.encode(), digest_size=7).digest()
        number = int.from_bytes(digest, "big")
        # Of all processes' numbers the largest and, negated, the smallest: they are one if both are equal.
        largest = torch.tensor([error is not None, number, -number], dtype=torch.int64, device="cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        has_error, highest, negated_lowest = largest.tolist()
        return bool(has_error) or highest != -negated_lowest

    def __call__(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """The features of all processes, image and text, in the order of the ranks.

        Raises:
            RuntimeError: for several processes without a process group.
        """
        return self.items(image_features), self.items(text_features)

    def items(self, features: Tensor, *, are_anchors: bool = True) -> Tensor:
        """The features of all processes, in the order of the ranks.

        Args:
            features: this process's.
            are_anchors: True for features that are also rows; with ``local_loss`` but without
                ``gather_with_grad`` only the rows have a gradient.

        Raises:
            RuntimeError: for several processes without a process group.
        """
        rank, world_size = self.place
        if (rank, world_size) == (0, 1):  # another rank without a group is refused below
            return features
        self._check_ready()
        shared = _gathered.get()
        key = self, are_anchors, id(features), torch.is_grad_enabled()  # all that the result depends on
        if shared is not None and key in shared:
            _, gathered = shared[key]
            return gathered
        if self.gather_with_grad:
            gathered = all_gather(features, self.group)
        else:
            gathered = _gather(features, self.group)
            only_rows_have_a_gradient = self.local_loss and are_anchors
            if not only_rows_have_a_gradient:  # put the own features, with their gradient, in place
                first = rank * len(features)
                end = first + len(features)
                gathered = torch.cat([gathered[:first], features, gathered[end:]])
        if shared is not None:
            shared[key] = features, gathered  # features are kept so that their id is not reused
        return gathered

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes of a tensor of one shape, such as a sum over this process's items.

        Every process computes its own rows from the sum, so the gradients of all processes are added up. With
        ``local_loss`` but without ``gather_with_grad`` the sum is a constant, as items are.

        Raises:
            RuntimeError: for several processes without a process group.
        """
        if self.place.world_size == 1:
            return x
        self._check_ready()
        if self.local_loss and not self.gather_with_grad:
            return _total(x, self.group)
        total: Tensor = _Total.apply(x, self.group)  # type: ignore[no-untyped-call]
        return total

    def constants(self, *features: Tensor | None) -> list[Tensor | None]:
        """Features ``[n, D_k]`` of all processes, without a gradient, in one collective; None stays None.

        Raises:
            RuntimeError: for several processes without a process group.
        """
        detached = [None if tensor is None else tensor.detach() for tensor in features]
        tensors = [tensor for tensor in detached if tensor is not None]
        if not tensors or self.place.world_size == 1:
            return detached
        self._check_ready()
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        side_by_side = torch.cat([tensor.to(dtype) for tensor in tensors], dim=1)
        widths = [tensor.shape[1] for tensor in tensors]
        gathered = iter(_gather(side_by_side, self.group).split(widths, dim=1))
        return [None if tensor is None else next(gathered) for tensor in features]

    def _check_ready(self) -> None:
        """Raise a RuntimeError without a process group, which several processes need."""
        if not _initialized():
            raise RuntimeError(
                f"rank={self.rank!r}, world_size={self.world_size!r} needs "
                "torch.distributed.init_process_group() before the first forward"
            )


_gathered: ContextVar[dict[Any, tuple[Tensor, Tensor]] | None] = ContextVar("_gathered", default=None)
"""Features and what was gathered of them, within :func:`gather_once`; None outside."""


@contextlib.contextmanager
def gather_once() -> Iterator[None]:
    """A context in which losses gather the same tensor once and share the result.

    A composition uses it around its base and its own terms, a trainer around all losses of a step.

    Example:
        >>> with gather_once():  # one process: nothing to gather
        ...     images, texts = Gather()(torch.ones(2, 3), torch.ones(2, 3))
    """
    if _gathered.get() is not None:  # an outer context's
        yield
        return
    token = _gathered.set({})
    try:
        yield
    finally:
        _gathered.reset(token)


GatherOption: TypeAlias = Gather | Literal[False] | None
"""The type of every loss's argument ``gather``."""
