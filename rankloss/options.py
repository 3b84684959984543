"""Every option of the rank terms, once, with its type, default, choices, bounds and meaning.

Constructors pass their ``**options`` to :class:`RankOptions`, which checks them. Command lines are generated
from its fields and from the first sentence of each entry of its ``Args``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch

T = TypeVar("T")

Model = Literal["plackett_luce", "top_one"]
Reduction = Literal["mean", "sum", "none"]
FixedReference = Literal[None, "image", "text"]
Method = Literal["sort", "bin"]
KernelOption = Literal["torch", "triton"]

_LARGEST_COUNT = 2**31 - 1
_BITS_OF_FLOATS = 1024  # of the largest integer that float64 holds
_BUDGET = {"cpu": 2**26}  # bytes
_BUDGET_ELSEWHERE = 2**30
_BINS = 640


def _bounded(default: Any, **bounds: float) -> Any:
    """A field with the bounds of a number: real if it has a bound ``above``, else a count."""
    return field(default=default, metadata=bounds)


OF_REFERENCE = ("lists", "worth", "ties", "discount")
"""Options that the functions of :mod:`rankloss.reference` alone have."""


def _refusing_those_of_reference(options: type[T]) -> type[T]:
    """A class of options whose error about one of :data:`OF_REFERENCE` says where it is."""
    dataclass_init: Any = options.__init__

    @functools.wraps(dataclass_init)  # with the signature, which tools read
    def checked_init(self: T, **values: Any) -> None:
        for name in OF_REFERENCE:
            if name in values:
                where = "rankloss.reference.cross_modal and in_modal have it"
                raise TypeError(f"{options.__name__} has no option {name!r}; {where}")
        dataclass_init(self, **values)

    options.__init__ = checked_init  # type: ignore[assignment, method-assign]
    return options


@_refusing_those_of_reference
@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Options of the rank terms: the ranking of the lists, and the reduction of their values.

    All of them are computed in linear memory, except ``reduction="none"``, which uses whole N×N matrices.
    Variants that were searched and found no better are functions of :mod:`rankloss.reference`.

    Args:
        model: Likelihood of the reference's ranking, or cross-entropy of top-one probabilities. It is the C(x
            | y) of a list. ``"plackett_luce"``: the NLL of the reference's ranking,
            :func:`rankloss.plackett_luce_nll`. ``"top_one"``: the cross-entropy between the softmax of the
            reference list and that of the scores, Σ_q p_q·(log Σ e^x − x_q) with p = softmax(y), the top-one
            probabilities of ListNet. It emphasises the top of a list and needs no sort. y has the scale of
            the scores and carries no gradient. This model needs ``method="sort"``, without ``top_k``;
            ``reduction="mean"`` averages the lists' cross-entropies.
        reference_scale: Multiplier of a teacher's similarities, with model top_one. None takes the scale of
            the scores. A suitable value is the teacher's ``logit_scale.exp()``.
        top_k: Number of best ranks of each list that count; None counts all. See
            :func:`rankloss.plackett_luce_nll`.
        reduction: Reduction of the lists' values. ``"mean"``: nats per counted item, averaged over the lists:
            every list is divided by the number of its items, or with ``top_k`` of those that count.
            ``"sum"``: the plain sum of the lists. ``"none"``: one value per anchor of this process; the
            values add up to ``"sum"``, with ``local_loss`` over all processes.
        diagonal: Include or exclude an anchor's own pair as an item of its lists. In the in-modal term it is
            the anchor itself. The paper includes it; the contrastive loss ranks it first in either case.
        fixed_reference: Modality whose rankings are a fixed reference for the other's; None is neither.
            ``"text"``: cross = C(S | R) and in = C(I | X). ``"image"``: vice versa. None: both directions.
        method: Rank a list by its exact order, or faster by bins of the reference. ``"bin"``: evenly spaced
            bins (:func:`rankloss.ranking.quantize`), whose items are tied.
        bins: Number of bins of method bin.
        chunk_size: Rows computed at a time: less memory, same result. None chooses from the sizes and the
            device, and keeps symmetric gradients, 64 MiB at most, to save products.
        memory_budget: Bytes of a whole matrix above which CLIP's and SigLIP's losses stream, too; None is
            64 MiB on a CPU, 1 GiB elsewhere. Within it, without rank terms, they use torch's formula.
        kernel: Torch's own operations, or one fused kernel of Triton per block of lists. ``"triton"``
            computes in float32 (the package ``rankloss_triton``); unsupported cases raise a ValueError with
            the reason.

    Raises:
        ValueError: for a value outside the choices or the bounds, or options that exclude each other; the
            message names the option and shows the value.
        TypeError: for an option that does not exist, or that :mod:`rankloss.reference` has.

    Example:
        >>> RankOptions(top_k=8)
        RankOptions(top_k=8)
    """

    model: Model = "plackett_luce"
    reference_scale: float | None = _bounded(None, above=0.0)
    top_k: int | None = None
    reduction: Reduction = "mean"
    diagonal: bool = True
    fixed_reference: FixedReference = None
    method: Method = "sort"
    bins: int = _bounded(_BINS, at_least=2, at_most=2**24)
    chunk_size: int | None = None
    memory_budget: int | None = _bounded(None, at_least=0, at_most=2**63 - 1)
    kernel: KernelOption = "torch"

    def __post_init__(self) -> None:
        for option in fields(RankOptions):  # a derived class checks its own
            self._check_value(option)
        needs: list[tuple[bool, str, dict[str, Any]]] = [
            (self.bins != _BINS, "bins", {"method": "bin"}),
            (self.reference_scale is not None, "reference_scale", {"model": "top_one"}),
            (self.model == "top_one", "model", {"top_k": None, "method": "sort"}),
        ]
        for is_given, name, needed in needs:
            if is_given:
                self._check_needs(name, needed)

    def _check_value(self, option: Field[Any]) -> None:
        """Raise a ValueError unless an option's value is a choice or a number in bounds; convert a number."""
        name = option.name
        value = getattr(self, name)
        bounds = option.metadata
        if CHOICES[name]:
            check_choice(name, value, CHOICES[name])
            return
        if value is None and option.default is None:
            return
        check = check_weight if "above" in bounds else check_count
        object.__setattr__(self, name, check(name, value, **bounds))  # the class is frozen

    def _check_needs(self, name: str, needed: dict[str, Any]) -> None:
        """Raise a ValueError unless other options have the values that an option needs."""
        for other, value in needed.items():
            if getattr(self, other) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs {other}={value!r}; got "
                    f"{other}={getattr(self, other)!r}"
                )

    def __repr__(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self.changed.items()]
        return f"RankOptions({', '.join(changed)})"

    @property
    def changed(self) -> dict[str, Any]:
        """The options with other values than their defaults."""
        changed = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if value != option.default:
                changed[option.name] = value
        return changed

    @functools.cached_property
    def directions(self) -> tuple[float, float]:
        """The weights of a term's two directions: the images' lists and the texts' lists."""
        return {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[self.fixed_reference]

    def anchor_weight(self, anchors: int, items: int) -> float:
        """The factor of each anchor's value in the sum over the anchors.

        With ``"sum"`` the anchors of one process, a share of the items, stand for all.
        """
        return {"mean": 1 / anchors, "sum": items / anchors, "none": 1.0}[self.reduction]

    def fits(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
        """True if a whole matrix of so many rows and columns is within the budget of bytes."""
        budget = self.memory_budget
        if budget is None:
            budget = _BUDGET.get(device.type, _BUDGET_ELSEWHERE)
        return rows * columns * dtype.itemsize <= budget

    def kernel_module(self, device: torch.device, dtype: torch.dtype, anchors: int, items: int) -> Any:
        """The package of ``kernel``, for the lists of so many anchors, each of so many items.

        Args:
            device: of the features.
            dtype: of the arithmetic.
            anchors: rows of the matrix.
            items: columns of the matrix.

        Raises:
            ValueError: if it is missing or does not support the case.
        """
        try:
            module = importlib.import_module(f"rankloss_{self.kernel}")
        except ImportError as error:
            raise ValueError(f"kernel={self.kernel!r} cannot be loaded: {error}") from error
        reason = module.why_not(self, device, dtype, anchors, items)
        if reason is not None:
            raise ValueError(f"kernel={self.kernel!r} does not serve here: {reason}")
        return module


def _choices(hint: Any) -> tuple[Any, ...]:
    """The choices of a type; empty for a number."""
    if hint is bool:
        return (True, False)
    return get_args(hint) if get_origin(hint) is Literal else ()


CHOICES = {name: _choices(hint) for name, hint in get_type_hints(RankOptions).items()}
"""The choices of an option, by name; empty for a number."""


def shown(value: object) -> str:
    """A value in an error; of an integer that no float holds the length, which Python would not print."""
    if isinstance(value, int) and value.bit_length() > _BITS_OF_FLOATS:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def check_choice(name: str, value: T, choices: Sequence[object]) -> T:
    """``value``, or a ValueError that names the argument unless it is one of ``choices``.

    Example:
        >>> check_choice("mode", "b", ("a", "c"))
        Traceback (most recent call last):
        ValueError: mode must be one of 'a', 'c'; got 'b'
    """
    # Compare the types, too: True equals 1, but must not replace it.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {shown(value)}")
    return value


def check_count(name: str, value: object, *, at_least: int = 1, at_most: int = _LARGEST_COUNT) -> int:
    """``value`` as an int, or a ValueError that names the argument unless it is a whole number in range.

    Other integer types (NumPy's) are taken; booleans and floats are not.

    Example:
        >>> check_count("steps", 2.5)
        Traceback (most recent call last):
        ValueError: steps must be an integer of at least 1; got 2.5
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; got {shown(value)}")
    if value > at_most:
        raise ValueError(f"{name} must be at most {at_most}; got {shown(value)}")
    return int(value)


def check_position(name: str, now: object, end_name: str, end: object) -> tuple[int, int]:
    """The position in training, ``now`` of ``end`` counted from 1; a ValueError names the arguments.

    Example:
        >>> check_position("step", 0, "total_steps", 10)
        Traceback (most recent call last):
        ValueError: step must be an integer of at least 1; got 0
    """
    position, last = check_count(name, now), check_count(end_name, end)
    if position > last:
        raise ValueError(f"{name} must be at most {end_name}; got {name}={now!r}, {end_name}={end!r}")
    return position, last


def check_weight(name: str, value: object, *, above: float | None = None, below: float = math.inf) -> float:
    """``value`` as a float, or a ValueError that names the argument.

    It must be a finite number, no tensor, less than ``below``, and greater than ``above``, or without it at
    least 0.

    Example:
        >>> check_weight("weight", -1)
        Traceback (most recent call last):
        ValueError: weight must be a finite number >= 0; got -1
    """
    number = math.nan  # which is refused, for what is no number
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer or a fraction that no float holds
            number = float(value)
    is_large_enough = number >= 0 if above is None else number > above
    if not (math.isfinite(number) and is_large_enough and number < below):
        bounds = [">= 0" if above is None else f"> {above:g}"]
        if below < math.inf:
            bounds.append(f"< {below:g}")
        raise ValueError(f"{name} must be a finite number {' and '.join(bounds)}; got {shown(value)}")
    return number
