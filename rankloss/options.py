"""The options of the rank terms, checked once."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from rankloss.plackett_luce import Discount, ListOptions, Ties, Worth, check_choice, check_count

__all__ = ["ConsistencyOptions", "ListsOption", "Method", "Reduction"]

ListsOption = Literal["row", "batch"]
Reduction = Literal["mean", "sum", "none"]
Method = Literal["sort", "bin"]


@dataclass(frozen=True)
class ConsistencyOptions:
    """Which lists a term is made of, how they are ranked and how their values are put together.

    The arguments are those of :class:`rankloss.RankConsistency`.
    """

    lists: ListsOption = "row"
    reduction: Reduction = "mean"
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
        check_count("bins", self.bins, at_least=2)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if self.memory_budget is not None:
            check_count("memory_budget", self.memory_budget, at_least=0)
        if self.method == "bin" and self.lists == "batch":
            raise ValueError("method='bin' ranks row lists; lists='batch' needs method='sort'")
        if self.method == "bin" and self.likelihood.ties == "random":
            raise ValueError("method='bin' ties the items of a bin; ties='random' needs method='sort'")
        object.__setattr__(self, "encoded", "")
        fields = asdict(self)
        del fields["encoded"]
        object.__setattr__(self, "encoded", json.dumps(fields))

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
        method: Method = "sort",
        bins: int = 2048,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> ConsistencyOptions:
        """The options by the names that users give them."""
        likelihood = ListOptions(worth, ties, discount, top_k)
        return cls(lists, reduction, method, bins, chunk_size, memory_budget, likelihood)

    @staticmethod
    @functools.lru_cache
    def decode(encoded: str) -> ConsistencyOptions:
        """The options that ``encoded`` is made of."""
        fields = json.loads(encoded)
        return ConsistencyOptions(**{**fields, "likelihood": ListOptions(**fields["likelihood"])})

    @property
    def bins_or_none(self) -> int | None:
        """The number of bins that lists are ranked by; None for their exact order."""
        return self.bins if self.method == "bin" else None
