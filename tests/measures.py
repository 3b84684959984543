"""The measures of lists, called alike: of scores, grades, and a mask where they take one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rankloss import metrics

MEASURES_WITH_MASK: dict[str, Callable[..., Any]] = {
    "kendall_tau": metrics.kendall_tau,
    "kendall_tau, c": functools.partial(metrics.kendall_tau, variant="c"),
    "pairwise_accuracy": metrics.pairwise_accuracy,
    "ndcg": functools.partial(metrics.ndcg, k=3),
    "reciprocal_rank": metrics.reciprocal_rank,
}
"""Measures whose lists may be padded."""
MEASURES_OF_LISTS: dict[str, Callable[..., Any]] = {
    **MEASURES_WITH_MASK,
    "spearman_rho": metrics.spearman_rho,
}
