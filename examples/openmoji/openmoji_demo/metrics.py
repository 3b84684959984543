"""Retrieval and classification scores, in percent, and what guessing would give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import multiclass_accuracy

RETRIEVAL_KS = (1, 5, 10)
CLASS_KS = (1, 3, 5)


def recall_at_k(similarity: torch.Tensor, ks: Sequence[int] = RETRIEVAL_KS) -> dict[int, float]:
    """Return R@k of queries in rows whose right answer is the column of the same number.

    Columns that tie with the right one share its places: the query counts by the chance that a random
    order among the tied ones puts the right one in the first k. Scores that are often equal, like a
    nearest-neighbour vote, can therefore gain nothing from the order in which the columns happen to lie.

    Args:
        similarity: One row for each query, one column for each candidate; a square matrix.
        ks: The cut-offs.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: expected a square matrix, got shape {tuple(similarity.shape)}")
    if not similarity.isfinite().all():
        raise ValueError(
            "similarity: holds NaN or infinity, so nothing can be ranked (did training diverge?)"
        )
    right = similarity.diagonal().unsqueeze(1)
    above = (similarity > right).sum(dim=1)
    tied = (similarity == right).sum(dim=1)
    return {k: 100 * ((k - above) / tied).clamp(0, 1).double().mean().item() for k in ks}


def accuracy_at_k(
    scores: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = CLASS_KS
) -> dict[int, float]:
    """Return top-k accuracy over all items (not averaged by class).

    Args:
        scores: One row for each item, one column for each class.
        labels: The right class of each item.
        ks: The cut-offs.
    """
    classes = scores.shape[1]
    return {
        k: 100
        * multiclass_accuracy(
            scores, labels, num_classes=classes, top_k=min(k, classes), average="micro"
        ).item()
        for k in ks
    }


def chance(n: int, ks: Sequence[int]) -> dict[int, float]:
    """Return what guessing among ``n`` equally likely answers scores at each cut-off."""
    return {k: 100 * min(k / n, 1.0) for k in ks}


def standard_error(percent: float, n: int) -> float:
    """Return the binomial standard error of a percentage that was counted over ``n`` items."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / n)
