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
    items: Tensor
    index: Tensor
    grades: Tensor
    scale: float
    mask: Tensor | None = None

    def leaves(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
        given = self.queries, self.items, torch.tensor(self.scale, dtype=F64)
        return tuple(x.detach().to(DEVICE, dtype).requires_grad_() for x in given)  # type: ignore[return-value]

    def loss(self, loss: RankedLists, q: Tensor, c: Tensor, s: Tensor, **more: Any) -> Tensor:
        given = {"candidate_index": self.index, "mask": self.mask, **more}
        found: Tensor = loss(q, c, fitting(self.grades, loss.model, loss.pair_weight), s, **given)
        return found

    def differentiated(self, value_of: Callable[..., Tensor], upstream: Tensor | float = 1.3) -> list[Tensor]:
        """A value of queries, items and scale, and its gradients."""
        inputs = self.leaves()
        value = value_of(*inputs)
        return [value, *gradients(value, inputs, upstream)]

    def owed(self, q: Tensor, c: Tensor, s: Tensor, **options: Any) -> Tensor:
        grades = fitting(self.grades, options.get("model"), options.get("pair_weight"))
        found: Tensor = literal(q, c, self.index, grades, s, self.mask, **options)
        return found


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
    is_item = grades == grades if mask is None else mask
    rows = [[int(i) for i in places[kept]] for places, kept in zip(index, is_item, strict=True)]
    values, terms = [], []
    for n, own in enumerate(rows):
        g = [float(y) for y in grades[n][is_item[n]]]
        others = []
        if in_batch_negatives:
            listed = sorted({j for row in rows for j in row})
            others = [j for j in listed if not any((items[j] == items[i]).all() for i in own)]
            if excluded is not None:
                others = [j for j in others if j != excluded[n]]
        g += [-math.inf] * len(others)
        x = [logit_scale * (query_features[n] * items[j]).sum() for j in [*own, *others]]
        if frozen is not None:
            x = [score - float(frozen[n, j]) for score, j in zip(x, [*own, *others], strict=True)]
        if model == "lambda":
            weights = reference.lambda_weights([score.item() for score in x], g, gain=gain)
            pairs = np.argwhere(weights)
            value, count = sum(weights[p, q] * _log_sum([0 * x[p], x[q] - x[p]]) for p, q in pairs), 1
        else:
            value, count = _list_value(x, g, model, top_k, pair_weight)
        ranked = len(set(g)) > 1
        values.append(value if ranked else 0 * x[0])
        terms.append(count if ranked else 0)
    if reduction == "mean":
        kept = [value / count for value, count in zip(values, terms, strict=True) if count]
        return sum(kept) / len(kept) if kept else 0 * sum(values)
    return sum(values) if reduction == "sum" else torch.stack(values)


def _log_sum(x: list[Any]) -> Any:
    return torch.stack(x).logsumexp(0)


def _list_value(
    x: list[Any], g: list[float], model: str, top_k: int | None, pair_weight: str | None
) -> tuple[Any, int]:
    """The value of one list and the number of its terms."""

    graded = [p for p in range(len(g)) if g[p] > -math.inf]
    value, count = 0 * x[0], 0
    if model == "top_one":
        total = sum(math.exp(g[p] - max(g)) for p in graded)
        for p in graded:
            value = value + math.exp(g[p] - max(g)) / total * (_log_sum(x) - x[p])
        return value, 1
    for p in graded:
        worse = [q for q in range(len(g)) if g[q] < g[p]]
        if model == "pairwise":
            for q in worse:
                weight = g[p] - g[q] if pair_weight else 1.0
                value, count = value + weight * _log_sum([0 * x[p], x[q] - x[p]]), count + 1
        elif top_k is None or 1 + sum(y > g[p] for y in g) <= top_k:
            below = [x[q] for q in range(len(g)) if g[q] <= g[p]]
            value, count = value + _log_sum(below) - x[p], count + (len(below) > 1)
    return value, count


def fitting(grades: Tensor, model: str | None, pair_weight: str | None) -> Tensor:
    """Grades that the model takes: the lowest is 0 and not −∞ for gains and differences."""
    return grades.clamp_min(0.0) if model == "lambda" or pair_weight else grades


def lists_of(
    seed: int, n: int, k: int, m: int, *, scale: float = 10.0, d: int = 5, masked: bool = True, equal: int = 0
) -> Lists:
    """Grades have ties and −∞; the last ``equal`` items repeat the first."""
    rng = np.random.default_rng(seed)
    items = unit_rows(rng, m, d)
    items[m - equal :] = items[:equal]
    index = np.stack([rng.permutation(m)[:k] if k <= m else rng.integers(0, m, k) for _ in range(n)])
    grades = rng.integers(0, 4, (n, k)).astype(float)
    grades[grades == 0] = rng.choice([0.0, -math.inf], (grades == 0).sum())
    mask = rng.random((n, k)) < 0.7
    mask[np.arange(n), rng.integers(0, k, n)] = True
    arrays = unit_rows(rng, n, d), items, index, grades
    return Lists(*map(torch.from_numpy, arrays), scale, torch.from_numpy(mask) if masked else None)


lists = st.builds(
    lambda seed, n, k, more, equal, scale, masked: lists_of(
        seed, n, k, k + more, equal=min(equal, (k + more) // 2), scale=scale, masked=masked
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 8),
    st.integers(0, 3),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.booleans(),
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
models = pytest.mark.parametrize("options", MODELS, ids=lambda o: "-".join(map(str, o.values())) or "default")


@dataclass(frozen=True)
class Frozen:
    """A frozen model of another width, and its scores of all queries and items."""

    queries: Tensor
    items: Tensor
    scale: float = 7.0

    @classmethod
    def of(cls, lists: Lists, seed: int = 5) -> Frozen:
        rng = np.random.default_rng(seed)
        return cls(*(torch.from_numpy(unit_rows(rng, len(x), 3)) for x in (lists.queries, lists.items)))

    @property
    def scores(self) -> Tensor:
        return self.scale * self.queries @ self.items.T

    def as_features(self, rows: slice = slice(None), places: slice = slice(None)) -> dict[str, Any]:
        return {
            "reference_query_features": self.queries[rows],
            "reference_candidate_features": self.items[places],
            "reference_scale": self.scale,
        }
