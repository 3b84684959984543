"""Every option of the rank terms, once, with its type, default, choices, bounds and meaning; and the plan.

Constructors take the options as ``**options: Unpack[RankOptionsDict]`` and hand them to :class:`RankOptions`,
which checks them; command lines and other trainers' argument classes are generated from its fields.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import operator
import typing
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypedDict, get_args

import torch

from rankloss import kernels

__all__ = [
    "OPTION_NAMES",
    "STREAMING_OPTION_NAMES",
    "Discount",
    "FixedReference",
    "KernelOption",
    "ListsOption",
    "Method",
    "Model",
    "Plan",
    "Precision",
    "RankOptions",
    "RankOptionsDict",
    "Reduction",
    "StreamingOptionsDict",
    "Ties",
    "Worth",
    "check_choice",
    "check_count",
    "check_names",
    "choices_of",
]

ListsOption = Literal["row", "batch"]
Model = Literal["plackett_luce", "top_one"]
Worth = Literal["exp", "shifted", "identity"]
Ties = Literal["shared", "random"]
Discount = Literal["log"]
Reduction = Literal["mean", "sum", "none"]
FixedReference = Literal["image", "text"]
Method = Literal["sort", "bin"]
KernelOption = Literal["auto", "torch", "triton"]
Precision = Literal["default", "exact-order"]


_LARGEST_COUNT = 2**31 - 1
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
    """A field with its bounds and what a command line shows: what None means, and the unit of a number."""
    bounds = {"at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"help": help, "bounds": bounds, "none": none, "unit": unit})


def _positive_option(default: float | None, help: str, *, none: str) -> Any:
    """A field that is a positive number."""
    return field(default=default, metadata={"help": help, "bounds": _POSITIVE, "none": none, "unit": "X"})


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Which lists a term is made of, how they are ranked, and how their values are put together.

    Args:
        lists: ``"row"``: N lists of N, one per anchor. ``"batch"``: one list of all N² pairs, the formula as
            printed in the paper; its memory is quadratic.
        model: what C(x | y) of a list is. ``"plackett_luce"``: the NLL of the reference's ranking,
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
        memory_budget: bytes that matrices of the whole batch may take to save products, see
            :class:`Plan`; None is 64 MiB on a CPU and 1 GiB elsewhere.
        kernel: ``"torch"``: torch's own operations. ``"triton"``: one fused kernel per block of lists
            (:mod:`rankloss.kernels`), in float32; where it does not serve, computing raises a ValueError that
            says why. ``"auto"``: torch's operations, until the kernels have been measured on a card. The plan
            says which, and why.
        precision: of the products that give the similarities of float32 features on an accelerator.
            ``"default"``: what torch is set to; where it may take TF32, as open_clip's trainer lets it, about
            8 % of neighbouring items change places. ``"exact-order"``: the order of float32 whatever torch is
            set to, by products of the features' upper and lower bits, at three times the cost of the
            similarities' products; those of the gradients follow torch.

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
    bins: int = _option(640, "number of bins of method bin", at_least=2, at_most=2**24, unit="B")
    chunk_size: int | None = _option(
        None,
        "rows computed at a time: less memory, same result",
        none="from the sizes and the device",
        unit="ROWS",
    )
    memory_budget: int | None = _option(
        None,
        "bytes that matrices of the whole batch may take to save products: more memory, same result",
        at_least=0,
        at_most=2**63 - 1,
        none="64 MiB on a CPU, 1 GiB elsewhere",
        unit="BYTES",
    )
    kernel: KernelOption = _option(
        "auto", "fused kernels of Triton on CUDA: triton; torch's operations: torch, and so far auto"
    )

    precision: Precision = _option(
        "default", "similarities as torch's products are set, or in the order of float32 under TF32 too"
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))
        if self.method == "bin" and self.lists == "batch":
            raise ValueError("method='bin' ranks row lists; lists='batch' needs method='sort'")
        if self.precision == "exact-order" and self.lists == "batch":
            raise ValueError(
                "precision='exact-order' serves row lists; lists='batch' takes precision='default'"
            )
        if self.method == "bin" and self.ties == "random":
            raise ValueError("method='bin' ties the items of a bin; ties='random' needs method='sort'")
        if not self.diagonal and self.ties == "random":
            raise ValueError(
                "diagonal=False makes lists of other items for every anchor, which ties='random' "
                "does not shuffle; it needs ties='shared'"
            )
        if self.model == "top_one":
            self._check_top_one()
        elif self.reference_scale is not None:
            raise ValueError(
                f"reference_scale={self.reference_scale!r} has no part in a ranking; it needs model='top_one'"
            )
        if self.kernel == "triton" and (reason := kernels.why_not_options(self)) is not None:
            raise ValueError(f"kernel='triton' does not serve these options: {reason}")

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

    @property
    def encoded(self) -> str:
        """All options as text: what an operator of a compiled graph can be given.

        Not JSON, whose encoder a compiler cannot trace.
        """
        return ", ".join([f"{name!r}: {getattr(self, name)!r}" for name in OPTION_NAMES])

    @staticmethod
    @functools.lru_cache
    def decode(encoded: str) -> RankOptions:
        """The options that ``encoded`` is made of."""
        return RankOptions(**ast.literal_eval("{" + encoded + "}"))

    @property
    def weighs_ranks(self) -> bool:
        """Whether any rank's μ is not 1."""
        return self.discount is not None or self.top_k is not None

    @property
    def bins_or_none(self) -> int | None:
        """The number of bins that lists are ranked by; None for their exact order."""
        return self.bins if self.method == "bin" else None

    @property
    def directions(self) -> tuple[float, float]:
        """The weights of a term's two directions: the lists of the images, and those of the texts."""
        return {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[self.fixed_reference]

    def anchor_weight(self, anchors: int, items: int) -> float:
        """The factor of one anchor's value before the anchors' values are added up."""
        return {"mean": 1 / anchors, "sum": items / anchors, "none": 1.0}[self.reduction]

    def fits(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a matrix of the whole batch is within the budget."""
        return rows * columns * dtype.itemsize <= self._budget(device)

    def _budget(self, device: torch.device) -> int:
        given = self.memory_budget
        return _BUDGET.get(device.type, _BUDGET_ELSEWHERE) if given is None else given

    @property
    def streaming(self) -> StreamingOptionsDict:
        """The options that any streamed loss has."""
        return {name: getattr(self, name) for name in STREAMING_OPTION_NAMES}  # type: ignore[return-value]

    def plan(
        self,
        anchors: int,
        items: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        has_teacher: bool = False,
    ) -> Plan:
        """How row lists of these sizes are computed.

        Args:
            anchors: how many rows have lists here.
            items: the length of a list.
            device: where the features are.
            dtype: of the arithmetic.
            has_teacher: whether the lists are ranked by a teacher's features.

        Raises:
            ValueError: for ``kernel="triton"`` where it does not serve; the message says why.

        Example:
            >>> plan = RankOptions().plan(4096, 4096, torch.device("cpu"), torch.float32)
            >>> plan.name, plan.chunk_size, plan.ranked_size, plan.slice_size, plan.matrix_bytes
            ('shared', 256, 256, 64, 67108864)
            >>> RankOptions().plan(8192, 8192, torch.device("cpu"), torch.float32).name
            'rows'
        """
        why_no_kernel = self._why_no_kernel(anchors, items, device, dtype)
        if self.kernel == "triton" and why_no_kernel is not None:
            raise ValueError(f"kernel='triton' does not serve here: {why_no_kernel}")
        chunk_size = self.chunk_size or max(_FEWEST_ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // items)
        chunk_size = min(chunk_size, anchors)
        ranked_size = max(1, min(chunk_size, _RANKED.get(device.type, _CHUNK_ELSEWHERE) // items))
        slice_size = max(1, min(ranked_size, _SLICE.get(device.type, _CHUNK_ELSEWHERE) // items))
        matrix_bytes, budget = items * items * dtype.itemsize, self._budget(device)
        shares = anchors == items and matrix_bytes <= budget
        # The student's first, which saves six products of a pass; the teacher's saves two.
        with_reference = matrix_bytes + matrix_bytes // 2
        shares_reference = shares and has_teacher and with_reference <= budget
        return Plan(
            name="shared" if shares else "rows",
            chunk_size=chunk_size,
            ranked_size=ranked_size,
            slice_size=slice_size,
            matrix_bytes=with_reference if shares_reference else matrix_bytes if shares else 0,
            kernel="torch" if why_no_kernel is not None else "triton",
            why_no_kernel=why_no_kernel,
            shares_reference=shares_reference,
        )

    def _why_no_kernel(
        self, anchors: int, items: int, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        if self.kernel == "torch":
            return "kernel='torch'"
        reason = kernels.why_not(self, device, dtype, anchors, items)
        if reason is None and self.kernel == "auto":
            return "kernel='auto' takes torch's operations until the kernels have run on a card"
        return reason


OPTION_NAMES = tuple(option.name for option in fields(RankOptions))


class StreamingOptionsDict(TypedDict, total=False):
    """The fields of :class:`RankOptions` that any streamed loss has."""

    chunk_size: int | None
    memory_budget: int | None


class RankOptionsDict(StreamingOptionsDict, total=False):
    """The fields of :class:`RankOptions`, for type checkers and completion."""

    lists: ListsOption
    model: Model
    reference_scale: float | None
    worth: Worth
    ties: Ties
    discount: Discount | None
    top_k: int | None
    reduction: Reduction
    diagonal: bool
    fixed_reference: FixedReference | None
    method: Method
    bins: int
    kernel: KernelOption
    precision: Precision


STREAMING_OPTION_NAMES = tuple(StreamingOptionsDict.__annotations__)


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


def check_names(owner: type, given: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raise a TypeError that names the class and the argument unless all ``given`` names are ``known``.

    It is for constructors with ``**options``, whose unexpected names Python does not refuse by itself.
    """
    known = frozenset(known)
    unexpected = [name for name in given if name not in known]
    if not unexpected:
        return
    layout = [name for name in unexpected if name in _LAYOUT]
    if layout:
        fields_given = ", ".join(f"{name}=…" for name in layout)
        raise TypeError(
            f"{owner.__name__} takes no {layout[0]!r}; pass gather=rankloss.Gather({fields_given})"
        )
    parameters = inspect.signature(owner).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    close = difflib.get_close_matches(unexpected[0], [*known, *named], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise TypeError(f"{owner.__name__} got an unexpected option {unexpected[0]!r}{hint}")


_LAYOUT = frozenset({"local_loss", "gather_with_grad", "rank", "world_size", "group"})


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


# Looked up once: a compiler that traces RankOptions stops at typing's functions, at caches and at metadata.
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
    if bounds is _POSITIVE:
        return _check_positive(option.name, value)
    return check_count(option.name, value, **bounds)


def _check_positive(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a number and takes no gradient; got a tensor that requires one")
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number; got {value!r}")
    return number


# --- the plan ---------------------------------------------------------------------------------------------

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
    """How row lists are computed; it follows from the sizes, the device and the options.

    Attributes:
        name: ``"rows"``: each chunk of rows is discarded once processed; twelve products of N×N×D in all,
            four for the similarities and eight for the gradients. ``"shared"``: the product of two embeddings
            that stands both in S and in R, or twice in I or X, is made once and kept until the rows reach its
            mirror image, and so is its gradient: six products.
        chunk_size: anchors of one product.
        ranked_size: anchors whose lists are ranked at once.
        slice_size: anchors whose running sums are taken at once.
        matrix_bytes: the most that is kept of whole matrices: 0, as much as one of N×N, or half as much more
            with the teacher's.
        shares_reference: whether the similarities of a teacher are shared likewise: two products of N×N×D'
            in place of four.
        kernel: what ranks and sums the lists: ``"torch"``'s operations, or the fused kernel in ``"triton"``,
            which takes all rows of a chunk at once.
        why_no_kernel: why it is not the fused kernel; None where it is.
    """

    name: Literal["rows", "shared"]
    chunk_size: int
    ranked_size: int
    slice_size: int
    matrix_bytes: int
    kernel: Literal["torch", "triton"]
    why_no_kernel: str | None
    shares_reference: bool = False
