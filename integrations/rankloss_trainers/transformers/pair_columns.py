"""Data of each pair for the loss: a teacher's features as columns or from a folder, and ids as a column."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from rankloss.checks import check_teacher
from rankloss.losses import TEACHER
from rankloss_features.binding import COLUMN, references
from rankloss_features.folder import Features
from rankloss_trainers.pair_ids import check_column, make_ids


def collate_pairs(
    collate: Callable[..., Any], features: Features | None, key: str | None, examples: Any
) -> Any:
    """A batch with its data for the loss, which the collator is not given; a teacher's features are checked.

    Args:
        collate: The collator that makes the batch.
        features: The folder that the examples are bound to, whose rows the batch gets; None without one.
        key: The column of the pairs' ids, texts or integers, which the batch gets as ``pair_ids``; or None.
        examples: The examples of the batch.

    Raises:
        ValueError: The examples are not bound to the folder, or have features beside it; they are bound and
            there is no folder; the features are no teacher's; there is no column of ids, or its values are
            no ids.
    """
    column_names = list(examples[0]) if isinstance(examples[0], Mapping) else []
    of_loss: dict[str, Any] = {}
    if features is not None:
        of_loss.update(_features_of(features, column_names, examples))
    elif COLUMN in column_names:
        raise ValueError(f"the data have {COLUMN}, of a folder that no option teacher names")
    if key is not None:
        of_loss["pair_ids"] = _ids_of(key, examples)
    batch = collate(_without((COLUMN, key), examples) if of_loss else examples)
    if of_loss:
        batch = {**batch, **of_loss}
    if isinstance(batch, Mapping):
        # Here the features are in the host's memory, where reading them waits for no device. Their norms are
        # checked by the loss, at its first batch.
        for name in TEACHER:
            if name in batch:
                check_teacher(name, batch[name], first_look=False)
    return batch


def _without(columns: Collection[str | None], examples: Any) -> list[dict[str, Any]]:
    """The examples without some columns."""
    return [{name: example[name] for name in example if name not in columns} for example in examples]


def _features_of(features: Features, column_names: list[str], examples: Any) -> dict[str, Any]:
    """The features of the rows that examples are bound to."""
    given = [name for name in TEACHER if name in column_names]
    if given:
        raise ValueError(f"teacher {features.path!r} and {', '.join(given)} are two teachers")
    if COLUMN not in column_names:
        bind = f"rankloss_features.bind(dataset, {features.path!r})"
        have = ", ".join(column_names)
        raise ValueError(f"the data have no column {COLUMN}, which {bind} adds; they have {have}")
    arrays = [np.asarray(example[COLUMN]) for example in examples]  # of lists, or of a format's tensors
    return references(features, np.array(arrays, np.int64))


def _ids_of(key: str, examples: Any) -> Any:
    """The ids of examples from their column."""
    for row, example in enumerate(examples):
        if key not in example:
            columns = ", ".join(examples[0])
            raise ValueError(f"the data have no column {key} of ids; row {row} has {columns}")
    return make_ids([_plain(example[key]) for example in examples], key)


def collate_ids(collate: Callable[..., Any], key: str, examples: Any) -> Any:
    """A batch of an evaluation, with the pairs' ids as ``pair_ids`` if the examples have them.

    Args:
        collate: The collator that makes the batch.
        key: The column of the ids.
        examples: The examples of the batch.

    Raises:
        ValueError: Values of the column are no ids.
    """
    if not all(isinstance(example, Mapping) and key in example for example in examples):
        return collate(examples)
    ids = _ids_of(key, examples)
    return {**collate(_without((key,), examples)), "pair_ids": ids}


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
    ids = make_ids([_plain(value) for value in as_stored[key]], key)
    check_column(ids, key)
    if len(ids) == 0:  # the Trainer refuses a table without rows
        return
    transformed = dataset[0]
    if key not in transformed:
        columns = ", ".join(transformed)
        raise ValueError(f"the data have {key} of ids, but their transform gives {columns} alone")


def _plain(value: Any) -> Any:
    """A number of Python in place of a tensor or an array of one."""
    return value.item() if hasattr(value, "item") else value


def list_columns(dataset: Any) -> list[str]:
    """All columns of a dataset without :data:`COLUMN`, also those that the model does not use.

    A dataset that names none has those of its first row. They are not known, and the list is empty, of a
    stream, of no rows, and of rows that are no mappings.
    """
    names = getattr(dataset, "column_names", None)
    if names is None and not isinstance(dataset, IterableDataset) and len(dataset) > 0:
        first_row = dataset[0]
        names = list(first_row) if isinstance(first_row, Mapping) else None
    return [name for name in names or () if name != COLUMN]
