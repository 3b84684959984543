"""Data of each pair for the loss: a teacher's features as columns or from a folder, and ids as a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from rankloss.checks import check_teacher
from rankloss.losses import TEACHER
from rankloss_features.binding import COLUMN, references
from rankloss_features.folder import Features
from rankloss_trainers.pair_ids import check_column, make_ids


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
        raise ValueError(f"the data have {COLUMN}, of a folder that no option teacher names")
    if features is None:
        batch = collate(examples)
    elif columns:
        raise ValueError(f"teacher {features.path!r} and {', '.join(columns)} are two teachers")
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


def collate_ids(collate: Callable[..., Any], key: str, examples: Any) -> Any:
    """A batch with the ids of its pairs, ``pair_ids``, from a column that the collator is not given.

    Args:
        collate: The collator that makes the batch.
        key: The column, of texts or integers.
        examples: The examples of the batch.

    Raises:
        ValueError: There is no such column, or its values are no ids.
    """
    missing = [n for n, example in enumerate(examples) if key not in example]
    if missing:
        raise ValueError(
            f"the data have no column {key} of ids; row {missing[0]} has {', '.join(examples[0])}"
        )
    ids = make_ids([_plain(example[key]) for example in examples], key)
    return {**collate([{name: x[name] for name in x if name != key} for x in examples]), "pair_ids": ids}


def check_ids(dataset: Any, key: str) -> None:
    """Check the whole column of ids of a table, without the table's transform; data of other kinds pass.

    Raises:
        ValueError: There is no such column, the transform drops it, its values are no ids, or all are equal.
    """
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or isinstance(dataset, IterableDataset):
        return
    if key not in names:
        raise ValueError(f"the data have no column {key} of ids; they have {', '.join(names)}")
    as_stored = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    check_column(make_ids([_plain(x) for x in as_stored[key]], key), key)
    if key not in (row := dataset[0]):
        raise ValueError(f"the data have {key} of ids, but their transform gives {', '.join(row)} alone")


def _plain(value: Any) -> Any:
    """A number of Python in place of a tensor or an array of one."""
    return value.item() if hasattr(value, "item") else value


def list_columns(dataset: Any) -> list[str]:
    """The columns of a dataset but the binding one, also unused ones; empty if they are not known."""
    names = getattr(dataset, "column_names", None)
    if names is None and not isinstance(dataset, IterableDataset) and isinstance(dataset[0], Mapping):
        names = dataset[0]
    return [name for name in names or () if name != COLUMN]
