"""Binds the data of trainers to the rows of a folder, by the hash of each pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloss.checks import check_teacher
from rankloss_features.data import Table, some_rows
from rankloss_features.folder import NAMES, Array, Features

COLUMN = "reference_pair"
"""The column with each row's own row of a folder and the hash of its pair."""


def bind(
    dataset: Any,
    folder: str,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    column: str = COLUMN,
) -> Any:
    """The dataset with a column that binds each row to its row of a folder, once every pair is compared.

    The column goes with the rows wherever they are shuffled, selected, tokenized or saved. The trainer that
    is given the folder looks the features up where it makes a batch, and compares the column with the folder:
    a caption or a picture that ``map`` changes after the binding keeps the features of the old one.

    Args:
        dataset: A ``datasets.Dataset``, in the order in which the features were computed.
        folder: A folder of ``rankloss features``.
        image_column: The column of the images, or of their paths.
        caption_column: The column of the captions.
        column: The name of the new column: ``label`` for sentence-transformers, which hands no other to a
            loss.

    Raises:
        TypeError: The data are no ``datasets.Dataset``: a dict of splits, a stream, or a list.
        ValueError: A row has another pair than the folder's, which the error names, or one of them has fewer
            rows; a picture of the same name has other content; the data lack a column, or have the new one
            already; or the folder is none of ``rankloss features``, unfinished or damaged.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]  # which datasets brings

    if not isinstance(dataset, datasets.Dataset):
        remedy = "; bind each split" if isinstance(dataset, dict) else ""
        raise TypeError(f"dataset must be a datasets.Dataset; got {type(dataset).__name__}{remedy}")
    if column in dataset.column_names:
        raise ValueError(f"dataset has a column {column} already: bind it once, or remove the column")
    features, table = Features(folder), Table(dataset, image_column, caption_column)
    features.compare(table.pairs(), "the data", ": bind before you shuffle, select or split")
    # Pairs are compared by the names of their pictures; some pictures are read, too: all would take long.
    features.compare_pictures(table.pictures(some_rows(len(features))), "the data")
    # A list of two integers for each row: its number, and the hash of its pair as a signed integer.
    bound = np.stack([np.arange(len(features)), features.pairs.view(np.int64)], axis=1)
    offsets = np.arange(0, bound.size + 1, bound.shape[1])
    return dataset.add_column(column, pa.ListArray.from_arrays(offsets, bound.ravel()))


def references(features: Features, bound: Array) -> dict[str, Tensor]:
    """The features of bound rows, by the names that losses have for them, ``reference_image_features`` say.

    Args:
        features: The folder.
        bound: ``[N, 2]``, int64: each row's row of the folder, and the hash of its pair, as :func:`bind` has
            written them.

    Raises:
        ValueError: The rows were bound to another folder, or one has no features.
    """
    rows, pairs = bound[:, 0], bound[:, 1].view(np.uint64)
    is_in_folder = (rows >= 0) & (rows < len(features))
    rows_to_read = np.where(is_in_folder, rows, 0)  # row 0 stands in for those that are not there
    is_bound_here = is_in_folder & (features.pairs[rows_to_read] == pairs)
    if not is_bound_here.all():
        row = int(rows[is_bound_here.argmin()])
        raise ValueError(
            f"row {row} of the data is not row {row} of {features.path}: bind them to this folder"
        )
    return {f"reference_{name}": torch.from_numpy(x) for name, x in features.take(rows).items()}


def features_of_labels(features: Features | None, labels: Tensor | None) -> dict[str, Tensor]:
    """A teacher's features of a batch, from the labels that sentence-transformers hands to a loss.

    Args:
        features: The folder that the labels are bound to; or None.
        labels: With a folder ``[N, 2]``, as :func:`bind` has written them. Without one the teacher's
            embeddings, ``[N, 2, D']`` of both columns, or ``[N, D']``, which are those of either column.

    Returns:
        ``reference_image_features`` and ``reference_text_features``, as far as the folder has them; nothing
        for labels that are neither bound nor embeddings, such as classes.

    Raises:
        ValueError: The labels and the folder do not go together, or the embeddings are no teacher's.
    """
    is_bound = labels is not None and labels.dtype == torch.int64 and labels.shape[1:] == (2,)
    has_folder = features is not None
    if is_bound != has_folder:
        path = None if features is None else features.path
        raise ValueError(
            "teacher and the column label go together: rankloss_features.bind(dataset, folder, "
            f"column='label'); got {path!r} and labels {labels}"
        )
    if labels is None:
        return {}
    if features is not None:
        bound = labels.cpu().numpy()
        return {name: x.to(labels.device) for name, x in references(features, bound).items()}
    are_embeddings = labels.is_floating_point() and labels.dim() in (2, 3)
    if not are_embeddings:
        return {}
    is_one_for_both_columns = labels.dim() == 2
    columns = [labels, labels] if is_one_for_both_columns else list(labels.unbind(1))
    if len(columns) != len(NAMES):
        raise ValueError(f"labels must have the embeddings of two columns; got shape {tuple(labels.shape)}")
    for i, column in enumerate(columns):
        check_teacher(f"column {i} of labels", column, first_look=False)
    return {f"reference_{name}": column for name, column in zip(NAMES, columns, strict=True)}
