"""The options of the rank terms, checked once."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, get_args

import torch

from rankloss.plackett_luce import Discount, ListOptions, Ties, Worth, check_choice, check_count
from rankloss.plans import Plan, choose_plan

__all__ = ["ConsistencyOptions", "FixedReference", "ListsOption", "Method", "Reduction"]

ListsOption = Literal["row", "batch"]
Reduction = Literal["mean", "sum", "none"]
Method = Literal["sort", "bin"]
FixedReference = Literal["image", "text"]


@dataclass(frozen=True)
class ConsistencyOptions:
    """Which lists a term is made of, how they are ranked and how their values are put together.

    The arguments are those of :class:`rankloss.RankConsistency`.
    """

    lists: ListsOption = "row"
    reduction: Reduction = "mean"
    diagonal: bool = True
    fixed_reference: FixedReference | None = None
    method: Method = "sort"
    bins: int = 2048
    chunk_size: int | None = None
    memory_budget: int | None = None
    likelihood: ListOptions = field(default_factory=ListOptions)
    encoded: str = field(init=False, repr=False, compare=False)
    """All of the above as JSON: what an operator of a compiled graph can be given."""

    def __post_init__(self) -> None:
        check_choice("lists", self.lists, get_args(ListsOption))
        check_choice("reduction", self.reduction, get_args(Reduction))
        check_choice("method", self.method, get_args(Method))
        check_choice("diagonal", self.diagonal, (True, False))
        check_choice("fixed_reference", self.fixed_reference, (None, *get_args(FixedReference)))
        check_count("bins", self.bins, at_least=2)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if self.memory_budget is not None:
            check_count("memory_budget", self.memory_budget, at_least=0)
        if self.method == "bin" and self.lists == "batch":
            raise ValueError("method='bin' ranks row lists; lists='batch' needs method='sort'")
        if self.method == "bin" and self.likelihood.ties == "random":
            raise ValueError("method='bin' ties the items of a bin; ties='random' needs method='sort'")
        if not self.diagonal and self.likelihood.ties == "random":
            raise ValueError(
                "diagonal=False makes lists of other items for every anchor, which ties='random' "
                "does not shuffle; it needs ties='shared'"
            )
        given = {option.name: getattr(self, option.name) for option in fields(self) if option.init}
        object.__setattr__(self, "encoded", json.dumps(given, default=asdict))

    @classmethod
    def of(
        cls,
        *,
        lists: ListsOption = "row",
        worth: Worth = "exp",
        ties: Ties = "shared",
        discount: Discount | None = None,
        top_k: int | None = None,
        reduction: Reduction = "mean",
        diagonal: bool = True,
        fixed_reference: FixedReference | None = None,
        method: Method = "sort",
        bins: int = 2048,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> ConsistencyOptions:
        """The options by the names that users give them."""
        likelihood = ListOptions(worth, ties, discount, top_k)
        return cls(
            lists=lists,
            reduction=reduction,
            diagonal=diagonal,
            fixed_reference=fixed_reference,
            method=method,
            bins=bins,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
            likelihood=likelihood,
        )

    @staticmethod
    @functools.lru_cache
    def decode(encoded: str) -> ConsistencyOptions:
        """The options that ``encoded`` is made of."""
        given = json.loads(encoded)
        return ConsistencyOptions(**{**given, "likelihood": ListOptions(**given["likelihood"])})

    @property
    def bins_or_none(self) -> int | None:
        """The number of bins that lists are ranked by; None for their exact order."""
        return self.bins if self.method == "bin" else None

    @property
    def directions(self) -> tuple[float, float]:
        """What a term's two directions count in it: the lists of the images, and those of the texts."""
        return {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[self.fixed_reference]

    def anchor_weight(self, anchors: int, items: int) -> float:
        """What the value of one of the anchors is multiplied by before they are put together."""
        length = items if self.diagonal else items - 1
        return {"mean": 1 / (anchors * length), "sum": items / anchors, "none": 1.0}[self.reduction]

    def plan(self, anchors: int, items: int, device: torch.device, dtype: torch.dtype) -> Plan:
        """How row lists of these sizes are computed, see :func:`rankloss.plans.choose_plan`."""
        return choose_plan(
            anchors, items, device, dtype, chunk_size=self.chunk_size, memory_budget=self.memory_budget
        )
