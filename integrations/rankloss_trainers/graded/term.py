"""The loss ``ranked-lists`` of the catalogue: graded candidates of each query, beside a loss of pairs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

import rankloss
from rankloss.distributed import GatherOption
from rankloss.losses import Base, base_entries, check_weight, combined
from rankloss.options import check_choice

OF_LISTS = tuple(
    name
    for name in inspect.signature(rankloss.RankedLists.forward).parameters
    if name not in ("self", "logit_scale", "output_dict")
)
"""The inputs of :class:`rankloss.RankedLists` beside the scale."""


class RankedListsTerm(nn.Module):
    r"""``L_base(pairs) + weight·L_lists(lists)``: :class:`rankloss.RankedLists` beside a loss of pairs.

    Args:
        lists: The loss of the lists.
        base: The loss of the batch's pairs; None for none.
        weight: The weight of the lists.
        needs_pairs: Refuse a batch without pairs; False leaves the base out where there are none.

    Shapes:
        As :class:`rankloss.RankedLists`; further inputs are of the base. The result is a scalar, or with
        ``output_dict=True`` the base's entries and ``{"ranked_lists_loss": …}``.

    Raises:
        ValueError: for a weight that is negative or not finite; in ``forward`` for a batch without lists or
            without a scale, for images or texts alone, with a base and ``needs_pairs`` for a batch without
            pairs, for inputs that only a base would use where none is called, with in-batch negatives for a
            query twice in the batch, and as the two losses.

    Example:
        >>> import torch
        >>> v, candidates = torch.eye(2), torch.eye(2).expand(2, 2, 2)
        >>> lists = dict(query_features=v, candidate_features=candidates, grades=torch.eye(2))
        >>> term = RankedListsTerm(rankloss.RankedLists(), weight=2.0)
        >>> round(term(logit_scale=1.0, **lists).item(), 4)  # 2·[log(e + 1) − 1]
        0.6265
    """

    def __init__(
        self,
        lists: rankloss.RankedLists,
        base: Base | None = None,
        *,
        weight: float = 1.0,
        needs_pairs: bool = True,
    ) -> None:
        super().__init__()
        self.base, self.lists, self.needs_pairs = base, lists, needs_pairs
        self.weight = check_weight("weight", weight)

    def forward(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        query_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands.

        Args:
            image_features: ``[N, D]``, of the pairs beside the lists; None for lists alone.
            text_features: ``[N, D]``, also of the pairs.
            logit_scale: The multiplier s, which must be given.
            logit_bias: A bias of the base.
            output_dict: Return a dict.
            query_ids: ``[N]`` integers, which tell a query that is twice in the batch where its features
                differ, as those of two crops of a picture do. With in-batch negatives they are compared at
                each call, for which an accelerator's host waits.
            **inputs: Those of the lists; the others are the base's.
        """
        if self.lists.in_batch_negatives:
            self._check_queries(inputs.get("query_features"), query_ids)
        lists = {name: inputs.pop(name) for name in OF_LISTS if name in inputs}
        _check_given(lists)
        if logit_scale is None:
            raise ValueError("logit_scale must be given, the multiplier of the similarities; got None")
        if (image_features is None) != (text_features is None):
            lone = "image_features" if text_features is None else "text_features"
            raise ValueError(f"pairs are image_features and text_features; got {lone} alone")
        if self.base is not None and self.needs_pairs and image_features is None:
            raise ValueError("base_loss include needs pairs beside the lists; the batch has none")
        if self.base is not None and image_features is not None and text_features is not None:
            pairs = image_features, text_features, logit_scale, logit_bias
            entries = base_entries(self.base, *pairs, **inputs)
        else:
            if inputs:
                raise ValueError(f"the lists alone have no use for {', '.join(sorted(inputs))}")
            entries = {}
            if logit_bias is not None:  # changes no list, but is a parameter of which DDP expects a gradient
                logit_scale = logit_scale + 0.0 * logit_bias
        return combined(entries, self.list_terms(logit_scale, **lists), output_dict)

    def _check_queries(self, queries: Tensor | None, ids: Tensor | None) -> None:
        """Raise a ValueError for a query twice in the batch, or if some processes alone have ids."""
        with self.lists.gather.agreement(self, query_features=queries, query_ids=ids):
            pass  # leaving compares the calls of the processes
        if ids is not None:
            _check_distinct(self.lists.gather.items(ids))

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={self.weight:g}"

    def list_terms(self, logit_scale: Tensor | float, **lists: Any) -> dict[str, Tensor]:
        """The weighted term of the lists, without the base."""
        return {"ranked_lists_loss": self.weight * self.lists(**lists, logit_scale=logit_scale)}


_REQUIRED = ("query_features", "candidate_features", "grades")


def _check_given(lists: Mapping[str, Any]) -> None:
    """Raise a ValueError for a batch without lists."""
    missing = [name for name in _REQUIRED if name not in lists]
    if missing:
        raise ValueError(
            "ranked-lists is called with each query's candidates and their grades, beside image_features and "
            f"text_features of pairs; missing are {', '.join(missing)}"
        )


def _check_distinct(ids: Tensor) -> None:
    """Raise a ValueError, the same on all processes, for a query twice in a batch."""
    values, counts = ids.unique(return_counts=True)
    if len(values) < len(ids):
        repeated = values[counts.argmax()]
        first, second, *_ = (ids == repeated).nonzero().flatten().tolist()
        raise ValueError(
            f"rows {first} and {second} of the batch are one query, whose candidates would be each "
            "other's in-batch negatives: give all candidates of a query as one list"
        )


def ranked_lists(
    base: Any,
    *,
    weight: float = 1.0,
    base_loss: Literal["auto", "include", "exclude"] = "auto",
    own_caption: Literal["apart", "top"] = "apart",
    gather: GatherOption = None,
    **options: Any,
) -> RankedListsTerm:
    """The trainer's own plus the likelihood of lists of graded candidates, which come with the data.

    Args:
        base: The loss of the pairs.
        weight: Weight of the lists beside the trainer's own loss.
        base_loss: Include or exclude the trainer's own loss, of the pairs of a picture and its caption; auto
            includes it where the data have pairs beside the lists.
        own_caption: The place of a picture's own caption in its list: apart from it, or at the top, above all
            graded candidates.
        gather: The gathering.
        **options: Those of :class:`rankloss.RankedLists`.

    Raises:
        ValueError: ``own_caption="top"`` with a model that goes by the grades' values, another value of
            ``base_loss`` or ``own_caption``, and as the two classes.
    """
    check_choice("base_loss", base_loss, ("auto", "include", "exclude"))
    check_choice("own_caption", own_caption, ("apart", "top"))
    lists = rankloss.RankedLists(gather=gather, **options)
    if own_caption == "top" and lists.uses_grade_values:
        text = "top is an order and no grade; it needs a model that goes by the order alone"
        raise ValueError(f"own_caption: {text}")
    base_beside = None if base_loss == "exclude" else base
    return RankedListsTerm(lists, base_beside, weight=weight, needs_pairs=base_loss == "include")
