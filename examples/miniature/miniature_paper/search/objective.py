"""Objective of the rounds, fixed before the first training, and the other scores that they report.

``templates/objective.md``, a part of the report, says why it is this objective.
"""

from __future__ import annotations

from statistics import fmean

from miniature_paper.collection import Record, Score
from miniature_paper.scores import SHIFTS

OBJECTIVE, RECALL = "objective", "R@10, both ways"


def recall_at_10(record: Record) -> float:
    """R@10, the mean of both directions."""
    metrics = record["metrics"]
    found = metrics["retrieval"] if "retrieval" in metrics else metrics["retrieval/test"]
    return (found["image_to_text R@10"] + found["text_to_image R@10"]) / 2


def zero_shot(record: Record) -> float:
    """Top-1 over all labelled pictures."""
    sets = _sets(record)
    items = {name: record["items"][name] for name in sets}
    return sum(items[name] * score for name, score in sets.items()) / sum(items.values())


def _sets(record: Record) -> dict[str, float]:
    found = {task: of for task, of in record["metrics"].items() if task.startswith("zero-shot/")}
    return {task: of["top-1"] for task, of in found.items() if task.partition("/")[2] not in SHIFTS.values()}


# The objective first, then its parts, then what is reported beside it.
SCORES: dict[str, Score] = {
    OBJECTIVE: lambda record: (recall_at_10(record) + zero_shot(record)) / 2,
    RECALL: recall_at_10,
    "zero-shot top-1, all pictures": zero_shot,
    "zero-shot top-1, mean of sets": lambda record: fmean(_sets(record).values()),  # as in Table 1
}
