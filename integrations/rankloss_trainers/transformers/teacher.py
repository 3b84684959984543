"""A teacher's features of each pair, as columns of the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from rankloss.checks import check_teacher
from rankloss_features.binding import COLUMN, references
from rankloss_features.folder import Features

BOUND = COLUMN
"""The column that :func:`rankloss_features.bind` adds."""

COLUMNS = ("reference_image_features", "reference_text_features")
"""The columns, ``[N, D']``: what losses call them, too."""


def split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch without the columns of a teacher's features, and these columns."""
    taught = {name: inputs[name] for name in COLUMNS if name in inputs}
    return {name: value for name, value in inputs.items() if name not in (*COLUMNS, BOUND)}, taught


def collate_checked(collate: Callable[..., Any], features: Features | None, examples: Any) -> Any:
    """A batch whose features of a teacher have been looked at, while they are in the host's memory.

    Args:
        collate: The collator that makes the batch.
        features: The folder that the examples are bound to, whose rows the batch gets; None without one.
        examples: What it makes it of.

    Raises:
        ValueError: The examples are not bound to the folder, or the features are no teacher's.
    """
    if features is None:
        batch = collate(examples)
    elif not all(BOUND in example for example in examples):
        raise ValueError(
            f"the data have no column {BOUND}, which rankloss_features.bind(dataset, {features.path!r}) adds "
            f"before they are shuffled and tokenized; they have {', '.join(examples[0])}"
        )
    else:
        bound = np.array([np.asarray(example[BOUND]) for example in examples], np.int64)
        batch = collate([{name: x[name] for name in x if name != BOUND} for x in examples])
        batch = {**batch, **references(features, bound)}
    for name in COLUMNS:
        if isinstance(batch, Mapping) and name in batch:
            check_teacher(name, batch[name], first_look=False)  # the loss looks at the norms of the first
    return batch


def columns_of(dataset: Any) -> list[str]:
    """The columns of a dataset, also those that a Trainer drops as unused; empty if they are not known."""
    names = getattr(dataset, "column_names", None)
    if names is None and not isinstance(dataset, IterableDataset):
        first = dataset[0]
        names = first if isinstance(first, Mapping) else None
    return list(names or ())


def check_columns(name: str, wanted: bool | None, found: Iterable[str], others: Iterable[str]) -> None:
    """Raise a ValueError unless the columns of a teacher's features are there just where they can be used.

    Args:
        name: The loss.
        wanted: True if it ranks by a teacher, None if it does so where one is given, False if it cannot.
        found: The columns of a teacher's features that a batch has.
        others: The other columns of the data.
    """
    found, others = list(found), list(others)
    if found and wanted is False:
        raise ValueError(
            f"the batch has {', '.join(found)}, but {name} does not rank by a teacher: drop the columns"
        )
    similar = [column for column in others if column.startswith("reference_") and column != BOUND]
    if wanted and len(found) < len(COLUMNS) and (similar or not found):
        raise ValueError(
            f"{name} ranks by a teacher, whose columns are {' and '.join(COLUMNS)}, or one of them; the data "
            f"have {', '.join([*found, *others])}"
        )
