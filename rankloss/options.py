"""Every option of the rank terms, once, with its type, default, choices, bounds and meaning.

Constructors take the options as ``**options`` and hand them to :class:`RankOptions`, which checks them;
command lines and other trainers' argument classes are generated from its fields.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import typing
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

ListsOption = Literal["row", "batch"]
Model = Literal["plackett_luce", "top_one"]
Worth = Literal["exp", "shifted", "identity"]
Ties = Literal["shared", "random"]
Discount = Literal["log"]
Reduction = Literal["mean", "sum", "none"]
FixedReference = Literal["image", "text"]
Method = Literal["sort", "bin"]
KernelOption = Literal["torch", "triton"]


_LARGEST_COUNT = 2**31 - 1
_BUDGET, _BUDGET_ELSEWHERE = {"cpu": 2**26}, 2**30  # bytes
_BINS = 640
_POSITIVE = {"above": 0.0}  # bounds of a number, beside those of a count


def _option(
    default: Any,
    help: str,
    *,
    at_least: int = 1,
    at_most: int = _LARGEST_COUNT,
    none: str = "",
    unit: str = "N",
) -> Any:
    """A field with its bounds, its help, the meaning of None, and the unit of a number."""
    bounds = {"at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"help": help, "bounds": bounds, "none": none, "unit": unit})


def _positive_option(default: float | None, help: str, *, none: str) -> Any:
    """A field that is a positive number."""
    return field(default=default, metadata={"help": help, "bounds": _POSITIVE, "none": none, "unit": "X"})


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Options of the rank terms: the lists, their ranking, and the reduction of their values.

    Row lists of worth ``exp`` with shared ties, without ``discount`` and ``reduction="none"``, are computed
    in linear memory; all else is computed from whole matrices of N×N.

    Args:
        lists: ``"row"``: N lists of N, one per anchor. ``"batch"``: one list of all N² pairs, the formula as
            printed in the paper.
        model: the C(x | y) of a list. ``"plackett_luce"``: the NLL of the reference's ranking,
            :func:`rankloss.plackett_luce_nll`. ``"top_one"``: the cross-entropy from the softmax of the
            reference's list to that of the scores' list, Σ_q p_q·(log Σ e^x − x_q) with p = softmax(y), the
            top-one probabilities of ListNet: it weighs the top of a list and needs no sort. y is on the scale
            of the scores and carries no gradient. It takes ``worth="exp"``, ``ties="shared"``,
            ``method="sort"``, and neither ``discount`` nor ``top_k``; ``reduction="mean"`` averages the
            lists' cross-entropies.
        reference_scale: for ``model="top_one"`` with a teacher's features, the multiplier of the teacher's
            similarities; None takes the scale of the scores. A teacher's own ``logit_scale.exp()`` fits.
        worth: ``"exp"``: eˣ of the scaled similarity. ``"shifted"``: (1 + cosine)/2. ``"identity"``: the
            cosine itself. The last two do not depend on ``logit_scale``; a cosine whose worth is not positive
            is a ValueError on a CPU, and makes the loss NaN where looking would make an accelerator's host
            wait or break a compiled graph.
        ties: ``"shared"`` or ``"random"``, see :func:`rankloss.plackett_luce_nll`.
        discount: None or ``"log"``, likewise.
        top_k: None or the number of best-ranked positions that count, likewise.
        reduction: ``"mean"``: nats per counted item, averaged over the lists: every list is divided by its
            Σ_p μ_p, which is its number of items without ``discount`` and ``top_k``. ``"sum"``: the plain sum
            of the lists. ``"none"``: one value per anchor of this process, which add up to ``"sum"``, over
            all processes where each has its own anchors (``local_loss``).
        diagonal: whether an anchor's own pair (in the in-modal term the anchor itself) is an item of its
            lists. It is in the paper; the contrastive loss ranks it first in any case.
        fixed_reference: ``"text"``: the texts' rankings are a fixed reference, cross = C(S | R) and
            in = C(I | X). ``"image"``: the other way round. None: both directions.
        method: ``"sort"``: lists are ranked by their exact order. ``"bin"``: by evenly spaced bins of the
            reference (:func:`rankloss.ranking.quantize`), faster; the items of a bin are tied.
        bins: the number of bins.
        chunk_size: rows multiplied out at a time; None chooses from the sizes and the device.
        memory_budget: bytes that one matrix of the whole batch may take; up to it CLIP's and SigLIP's losses
            on their own are torch's formula, and beyond it they stream like the rank terms. None is 64 MiB on
            a CPU and 1 GiB elsewhere.
        kernel: ``"torch"``: torch's own operations. ``"triton"``: one fused kernel per block of lists, in
            float32 (the package ``rankloss_triton``); where it does not serve, computing raises a ValueError
            that says why.

    Raises:
        ValueError: for a value that is not among the choices or below its bound, or options that exclude each
            other; the message names the option and shows the value.
        TypeError: for an option that does not exist.

    Example:
        >>> RankOptions(top_k=8)
        RankOptions(top_k=8)
    """

    lists: ListsOption = _option("row", "one list per anchor, or one list of all pairs of the batch")
    model: Model = _option(
        "plackett_luce", "likelihood of the reference's ranking, or cross-entropy of top-one probabilities"
    )
    reference_scale: float | None = _positive_option(
        None, "multiplier of a teacher's similarities under model top_one", none="that of the scores"
    )
    worth: Worth = _option("exp", "worth of an item: exp of the logit, (1 + cosine)/2, or the cosine")
    ties: Ties = _option("shared", "equal reference scores share one denominator, or are shuffled")
    discount: Discount | None = _option(None, "weight of a rank: 1/log(1 + rank)", none="1")
    top_k: int | None = _option(None, "count only the best ranks of each list", none="all", unit="K")
    reduction: Reduction = _option("mean", "how the lists' values are put together")
    diagonal: bool = _option(True, "whether an anchor's own pair is an item of its lists")
    fixed_reference: FixedReference | None = _option(
        None, "the modality whose rankings are a fixed reference for the other's", none="neither"
    )
    method: Method = _option("sort", "rank a list by its exact order, or faster by bins of the reference")
    bins: int = _option(_BINS, "number of bins of method bin", at_least=2, at_most=2**24, unit="B")
    chunk_size: int | None = _option(
        None,
        "rows computed at a time: less memory, same result",
        none="from the sizes and the device",
        unit="ROWS",
    )
    memory_budget: int | None = _option(
        None,
        "bytes that a matrix of the whole batch may take before CLIP's own loss streams, too",
        at_least=0,
        at_most=2**63 - 1,
        none="64 MiB on a CPU, 1 GiB elsewhere",
        unit="BYTES",
    )
    kernel: KernelOption = _option("torch", "torch's operations, or fused kernels of Triton on CUDA")

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))
        if self.method == "sort" and self.bins != _BINS:
            raise ValueError(f"bins={self.bins!r} only applies to method='bin'; got method='sort'")
        if self.method == "bin" and self.lists == "batch":
            raise ValueError("method='bin' ranks row lists; lists='batch' needs method='sort'")
        if self.method == "bin" and self.ties == "random":
            raise ValueError("method='bin' ties the items of a bin; ties='random' needs method='sort'")
        if not self.diagonal and self.ties == "random":
            raise ValueError("diagonal=False is incompatible with ties='random'; it needs ties='shared'")
        if self.model == "top_one":
            self._check_top_one()
        elif self.reference_scale is not None:
            raise ValueError(f"reference_scale={self.reference_scale!r} only applies to model='top_one'")

    def _check_top_one(self) -> None:
        excluded = {"worth": "exp", "ties": "shared", "discount": None, "top_k": None, "method": "sort"}
        for name, needed in excluded.items():
            if (value := getattr(self, name)) != needed:
                raise ValueError(
                    f"model='top_one' weighs all items by their probabilities; {name}={value!r} needs "
                    "model='plackett_luce'"
                )

    def __repr__(self) -> str:
        return f"RankOptions({', '.join(f'{name}={value!r}' for name, value in self.changed.items())})"

    @property
    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def replaced(self, **changes: Any) -> RankOptions:
        """The same with some options changed."""
        return replace(self, **changes)

    @property
    def is_dense(self) -> bool:
        """True where the terms are computed from whole matrices of N×N, by :mod:`rankloss.dense`.

        Row lists of worth ``exp`` with shared ties are computed in linear memory.
        """
        is_streamed = self.lists == "row" and self.worth == "exp" and self.ties == "shared"
        return not is_streamed or self.discount is not None or self.reduction == "none"

    @property
    def directions(self) -> tuple[float, float]:
        """The weights of a term's two directions: the lists of the images, and those of the texts."""
        return {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[self.fixed_reference]

    def anchor_weight(self, anchors: int, items: int) -> float:
        """The factor of one anchor's value before the anchors' values are added up."""
        return {"mean": 1 / anchors, "sum": items / anchors, "none": 1.0}[self.reduction]

    def fits(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
        """True if a matrix of the whole batch is within the budget."""
        budget = self.memory_budget
        if budget is None:
            budget = _BUDGET.get(device.type, _BUDGET_ELSEWHERE)
        return rows * columns * dtype.itemsize <= budget

    @property
    def streaming(self) -> dict[str, Any]:
        """The options that any streamed loss has."""
        return {name: getattr(self, name) for name in STREAMING_OPTION_NAMES}


OPTION_NAMES = tuple(option.name for option in fields(RankOptions))


STREAMING_OPTION_NAMES = ("chunk_size", "memory_budget")
"""Those that any streamed loss has."""


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError that names the argument unless ``value`` is one of ``choices``."""
    # By type too: True equals 1, and neither may stand for the other.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_count(name: str, value: object, *, at_least: int = 1, at_most: int = _LARGEST_COUNT) -> int:
    """``value`` as an int, or a ValueError that names the argument unless it is a whole number in range.

    Other integer types (NumPy's) are taken; booleans and floats are not.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or count < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; got {value!r}")
    if count > at_most:
        raise ValueError(f"{name} must be at most {at_most}; got {value!r}")
    return count


def check_weight(name: str, value: Any, *, above: float | None = None) -> float:
    """``value`` as a float, or a ValueError that names the argument.

    It must be finite, and greater than ``above``, or without it at least 0.
    """
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a number and takes no gradient; got a tensor that requires one")
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a meta tensor
        number = math.nan
    if not (math.isfinite(number) and (number >= 0 if above is None else number > above)):
        bound = ">= 0" if above is None else f"> {above:g}"
        raise ValueError(f"{name} must be finite and {bound}; got {value!r}")
    return number


def check_names(owner: type, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a TypeError that names the class and the argument unless all ``given`` names are ``known``.

    It is for constructors with ``**options``, whose unexpected names Python does not refuse by itself.
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *inspect.signature(owner).parameters], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{owner.__name__} got an unexpected option {name!r}{hint}")


def choices_of(name: str) -> tuple[Any, ...]:
    """The values that an option can have; empty where it is a number.

    Example:
        >>> choices_of("fixed_reference"), choices_of("diagonal"), choices_of("bins")
        ((None, 'image', 'text'), (True, False), ())
    """
    return _CHOICES[name]


def _literals(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (True, False)
    parts = get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
    literals = tuple(value for part in parts for value in get_args(part))
    return (None, *literals) if literals and type(None) in parts else literals


_CHOICES = {name: _literals(hint) for name, hint in typing.get_type_hints(RankOptions).items()}
_BOUNDS: dict[str, Any] = {option.name: option.metadata["bounds"] for option in fields(RankOptions)}


def _checked(option: Field[Any], value: Any) -> Any:
    choices = choices_of(option.name)
    if choices:
        check_choice(option.name, value, choices)
        return value
    if value is None and option.default is None:
        return None
    bounds = _BOUNDS[option.name]
    return (check_weight if bounds is _POSITIVE else check_count)(option.name, value, **bounds)
