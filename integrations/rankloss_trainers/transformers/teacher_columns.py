"""A teacher's features of each pair: columns of the training data, or a folder that these are bound to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from rankloss.checks import check_teacher
from rankloss.losses import TEACHER
from rankloss_features.binding import COLUMN, references
from rankloss_features.folder import Features


def collate_checked(collate: Callable[..., Any], features: Features | None, examples: Any) -> Any:
    """A batch whose features of a teacher have been checked, while they are in the host's memory.

    Args:
        collate: The collator that makes the batch.
        features: The folder that the examples are bound to, whose rows the batch gets; None without one.
        examples: The examples of the batch.

    Raises:
        ValueError: The examples are not bound to the folder, or have features beside it; they are bound and
            there is no folder; or the features are no teacher's.
    """
    names = list(examples[0]) if isinstance(examples[0], Mapping) else []
    columns = [name for name in TEACHER if name in names]
    if features is None and COLUMN in names:
        raise ValueError(f"the data have {COLUMN}, of a folder that no option reference_features names")
    if features is None:
        batch = collate(examples)
    elif columns:
        raise ValueError(f"reference_features {features.path!r} and {', '.join(columns)} are two teachers")
    elif COLUMN not in names:
        bind = f"rankloss_features.bind(dataset, {features.path!r})"
        raise ValueError(f"the data have no column {COLUMN}, which {bind} adds; they have {', '.join(names)}")
    else:
        bound = np.array([np.asarray(example[COLUMN]) for example in examples], np.int64)
        batch = collate([{name: x[name] for name in x if name != COLUMN} for x in examples])
        batch = {**batch, **references(features, bound)}
    for name in TEACHER:
        if isinstance(batch, Mapping) and name in batch:
            check_teacher(name, batch[name], first_look=False)  # the loss looks at the norms of the first
    return batch


def columns_of(dataset: Any) -> list[str]:
    """The columns of a dataset but the binding one, also unused ones; empty if they are not known."""
    names = getattr(dataset, "column_names", None)
    if names is None and not isinstance(dataset, IterableDataset) and isinstance(dataset[0], Mapping):
        names = dataset[0]
    return [name for name in names or () if name != COLUMN]
