"""What the search maximises, fixed before its first training, and the other scores that it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]
Score = Callable[[Record], float]
OBJECTIVE = "objective"
# The report quotes it.
DEFINITION = """\
**The objective**, in points: half of it is the recall at 10 among the held-out concepts (the mean of both
directions), half the zero-shot top-1 accuracy over all labelled pictures of the ten sets. A setting's worth
is the mean over seeds of its objective less plain CLIP's at the same batch size and with the same seed.

Why it is this one:

- Recall and zero-shot accuracy are what the paper reports first; both are percentages of a similar level
  here, so an equal share of each lets none of them decide alone. R@10 and not R@1, because among thousands of
  concepts R@1 of so small a model rests on few hits.
- Every labelled picture counts the same, not every set: the smallest set has 32 pictures on the validation
  side, where one picture would move a mean over ten sets by 0.3 points. Table 1's mean over the sets is
  reported beside it.
- Settings are ordered by the mean difference and not by that in units of its standard error: from three or
  four seeds the error itself is so uncertain that such an order prefers settings whose seeds happen to agree.
  Every difference is shown with its interval."""


def recall_at_10(record: Record) -> float:
    """R@10, the mean of both directions."""
    found = record["metrics"]["retrieval"]
    return (found["image_to_text R@10"] + found["text_to_image R@10"]) / 2


def zero_shot(record: Record) -> float:
    """Top-1 over all labelled pictures."""
    sets = _sets(record)
    items = {name: record["items"][name] for name in sets}
    return sum(items[name] * score for name, score in sets.items()) / sum(items.values())


def zero_shot_of_sets(record: Record) -> float:
    """Top-1, the mean of the sets, as in Table 1."""
    sets = _sets(record)
    return sum(sets.values()) / len(sets)


def objective(record: Record) -> float:
    """What is maximised."""
    return (recall_at_10(record) + zero_shot(record)) / 2


def diverged(record: Record) -> bool:
    """Whether the training ended in a model that has no numbers."""
    return bool(record["diverged"])


def _sets(record: Record) -> dict[str, float]:
    return {
        task: scores["top-1"] for task, scores in record["metrics"].items() if task.startswith("zero-shot/")
    }


# The objective first, then its parts, then what is reported beside it.
SCORES: dict[str, Score] = {
    OBJECTIVE: objective,
    "R@10, both ways": recall_at_10,
    "zero-shot top-1, all pictures": zero_shot,
    "zero-shot top-1, mean of sets": zero_shot_of_sets,
}
