"""Lists of graded candidates for the tests, their loss item by item, and a frozen model of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from batches import gradients, unit_rows
from devices import DEVICE
from rankloss import RankedLists, reference

F64 = torch.float64


@dataclass(frozen=True)
class Lists:
    """N lists of K candidates among M items; float64."""

    queries: Tensor
    """``[N, D]``."""
    items: Tensor
    """``[M, D]``."""
    index: Tensor
    """``[N, K]``: the items of each list."""
    grades: Tensor
    """``[N, K]``."""
    scale: float
    mask: Tensor | None = None
    """``[N, K]``: False at padding."""

    def leaves(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, items and the scale as tensors that take a gradient."""
        tensors = self.queries, self.items, torch.tensor(self.scale, dtype=F64)
        return tuple(x.detach().to(DEVICE, dtype).requires_grad_() for x in tensors)  # type: ignore[return-value]

    def value_of(self, loss: RankedLists, q: Tensor, c: Tensor, s: Tensor, **inputs: Any) -> Tensor:
        """The library's value of these lists."""
        grades = grades_for_model(self.grades, loss.model, loss.pair_weight)
        inputs = {"candidate_index": self.index, "mask": self.mask, **inputs}
        value: Tensor = loss(q, c, grades, s, **inputs)
        return value

    def loss_item_by_item(self, q: Tensor, c: Tensor, s: Tensor, **options: Any) -> Tensor:
        """The expected value, in plain torch and item by item: see :func:`literal`."""
        grades = grades_for_model(self.grades, options.get("model"), options.get("pair_weight"))
        value: Tensor = literal(q, c, self.index, grades, s, self.mask, **options)
        return value

    def differentiated(self, value_of: Callable[..., Tensor], upstream: Tensor | float = 1.3) -> list[Tensor]:
        """The value of a function of queries, items and scale, and its gradients by them."""
        inputs = self.leaves()
        value = value_of(*inputs)
        return [value, *gradients(value, inputs, upstream)]


def literal(
    query_features: Any,
    items: Any,
    index: Any,
    grades: Any,
    logit_scale: Any,
    mask: Any = None,
    *,
    model: str = "plackett_luce",
    top_k: int | None = None,
    pair_weight: str | None = None,
    gain: str = "linear",
    in_batch_negatives: bool = False,
    reduction: str = "mean",
    frozen: Any = None,
    excluded: Any = None,
) -> Any:
    """The loss item by item, differentiable: ``rankloss.reference`` has no lists of their own lengths.

    ``frozen`` has the reference's scores of all queries and items, ``excluded`` an item of each query that is
    no negative.
    """
    is_item = ~grades.isnan() if mask is None else mask
    own_items = [items_of_list[kept].tolist() for items_of_list, kept in zip(index, is_item, strict=True)]
    values, counts = [], []
    for n, own in enumerate(own_items):
        negatives: list[int] = []
        if in_batch_negatives:
            negatives = _negatives(items, own_items, n, None if excluded is None else excluded[n])
        list_grades = [*map(float, grades[n][is_item[n]]), *[-math.inf] * len(negatives)]
        scores = [logit_scale * (query_features[n] * items[item]).sum() for item in (*own, *negatives)]
        if frozen is not None:
            of_frozen = [float(frozen[n, item]) for item in (*own, *negatives)]
            scores = [score - known for score, known in zip(scores, of_frozen, strict=True)]
        value, count = 0 * scores[0], 0
        has_an_order = len(set(list_grades)) > 1
        if has_an_order and model == "plackett_luce":
            value, count = _plackett_luce(scores, list_grades, top_k)
        elif has_an_order and model == "top_one":
            value, count = _top_one(scores, list_grades), 1
        elif has_an_order and model == "pairwise":
            value, count = _pairwise(scores, list_grades, pair_weight)
        elif has_an_order:
            value, count = _lambda(scores, list_grades, gain), 1
        values.append(value)
        counts.append(count)
    return _reduced(values, counts, reduction)


def _negatives(items: Tensor, own_items: list[list[int]], n: int, excluded: int | None) -> list[int]:
    """The items of other queries' lists that equal none of this query's, without the excluded one."""
    listed = sorted({item for own in own_items for item in own})

    def is_own(item: int) -> bool:
        return bool((items[item] == items[own_items[n]]).all(-1).any())

    return [item for item in listed if item != excluded and not is_own(item)]


def _reduced(values: list[Any], counts: list[int], reduction: str) -> Any:
    """The lists' values; the mean is of those with a term, by its number of terms each."""
    if reduction == "mean":
        means = [value / count for value, count in zip(values, counts, strict=True) if count]
        return sum(means) / len(means) if means else 0 * sum(values)
    return sum(values) if reduction == "sum" else torch.stack(values)


def _log_sum(scores: list[Any]) -> Any:
    return torch.stack(scores).logsumexp(0)


def _softplus(score: Any) -> Any:
    """log(1 + eˣ)."""
    return _log_sum([0 * score, score])


def _graded(grades: list[float]) -> list[int]:
    """The places of the items that have a grade."""
    return [p for p, grade in enumerate(grades) if grade > -math.inf]


def _plackett_luce(scores: list[Any], grades: list[float], top_k: int | None) -> tuple[Any, int]:
    """The likelihood's logarithm, negated, and its number of terms: those in which an item has a choice."""
    value, count = 0 * scores[0], 0
    for p in _graded(grades):
        rank = 1 + sum(grade > grades[p] for grade in grades)
        if top_k is None or rank <= top_k:
            no_better = [score for score, grade in zip(scores, grades, strict=True) if grade <= grades[p]]
            value = value + _log_sum(no_better) - scores[p]
            count += len(no_better) > 1
    return value, count


def _top_one(scores: list[Any], grades: list[float]) -> Any:
    """The cross-entropy of the probabilities to be the first, which the grades are logits of."""
    worths = [math.exp(grade - max(grades)) for grade in grades]
    value = 0 * scores[0]
    for p in _graded(grades):
        value = value + worths[p] / sum(worths) * (_log_sum(scores) - scores[p])
    return value


def _pairwise(scores: list[Any], grades: list[float], pair_weight: str | None) -> tuple[Any, int]:
    """The sum over the pairs of a graded item and a worse one, and their number."""
    value, count = 0 * scores[0], 0
    for better in _graded(grades):
        for worse in range(len(grades)):
            if grades[worse] < grades[better]:
                weight = grades[better] - grades[worse] if pair_weight else 1.0
                value = value + weight * _softplus(scores[worse] - scores[better])
                count += 1
    return value, count


def _lambda(scores: list[Any], grades: list[float], gain: str) -> Any:
    """NDCG-Loss2++, whose weights are constants."""
    weights = reference.lambda_weights([score.item() for score in scores], grades, gain=gain)
    pairs = np.argwhere(weights)
    return sum(weights[better, worse] * _softplus(scores[worse] - scores[better]) for better, worse in pairs)


def grades_for_model(grades: Tensor, model: str | None, pair_weight: str | None) -> Tensor:
    """The grades, with 0 in the place of −∞ where the model takes gains or differences of grades."""
    return grades.clamp_min(0.0) if model == "lambda" or pair_weight else grades


def random_lists(
    seed: int, n: int, k: int, m: int, *, scale: float = 10.0, d: int = 5, masked: bool = True, equal: int = 0
) -> Lists:
    """N lists of K among M items of D dimensions, of which the last ``equal`` repeat the first.

    Grades have ties and −∞; some places are padding if ``masked``.
    """
    rng = np.random.default_rng(seed)
    items = unit_rows(rng, m, d)
    items[m - equal :] = items[:equal]
    if k <= m:
        index = np.stack([rng.permutation(m)[:k] for _ in range(n)])
    else:  # too few items: some are twice in a list
        index = np.stack([rng.integers(0, m, k) for _ in range(n)])
    grades = rng.integers(0, 4, (n, k)).astype(float)
    is_lowest = grades == 0
    grades[is_lowest] = rng.choice([0.0, -math.inf], is_lowest.sum())
    mask = rng.random((n, k)) < 0.7
    mask[np.arange(n), rng.integers(0, k, n)] = True  # no list is empty
    arrays = unit_rows(rng, n, d), items, index, grades
    return Lists(*map(torch.from_numpy, arrays), scale, torch.from_numpy(mask) if masked else None)


@st.composite
def any_lists(draw: st.DrawFn) -> Lists:
    """Lists of some of the items, of which some may be equal."""
    k = draw(st.integers(1, 5))
    m = k + draw(st.integers(0, 8))
    return random_lists(
        seed=draw(st.integers(0, 2**32 - 1)),
        n=draw(st.integers(1, 5)),
        k=k,
        m=m,
        equal=min(draw(st.integers(0, 3)), m // 2),
        scale=draw(st.sampled_from([1.0, 10.0, 100.0])),
        masked=draw(st.booleans()),
    )


MODELS: list[dict[str, Any]] = [
    {},
    {"top_k": 2},
    {"model": "top_one"},
    {"model": "pairwise"},
    {"model": "pairwise", "pair_weight": "difference"},
    {"model": "lambda"},
    {"model": "lambda", "gain": "exponential"},
    {"in_batch_negatives": True},
    {"in_batch_negatives": True, "top_k": 1},
    {"in_batch_negatives": True, "model": "top_one"},
    {"in_batch_negatives": True, "model": "pairwise"},
]
every_model = pytest.mark.parametrize(
    "options", MODELS, ids=lambda o: "-".join(map(str, o.values())) or "default"
)


@dataclass(frozen=True)
class Frozen:
    """A frozen model of another width, and its scores of all queries and items."""

    queries: Tensor
    items: Tensor
    scale: float = 7.0

    @classmethod
    def of(cls, lists: Lists, seed: int = 5) -> Frozen:
        """A model of random features of the lists' queries and items."""
        rng = np.random.default_rng(seed)
        return cls(*(torch.from_numpy(unit_rows(rng, len(x), 3)) for x in (lists.queries, lists.items)))

    @property
    def scores(self) -> Tensor:
        """``[N, M]``."""
        return self.scale * self.queries @ self.items.T

    def as_features(self, rows: slice = slice(None), places: slice = slice(None)) -> dict[str, Any]:
        """The inputs of ``RankedLists`` for some rows of queries and some places of items."""
        return {
            "reference_query_features": self.queries[rows],
            "reference_candidate_features": self.items[places],
            "reference_scale": self.scale,
        }
