"""Cached gradients: a model that embeds a batch in mini-batches, in the memory of one (GradCache)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """The split of a batch of a model's inputs into mini-batches.

    Attributes:
        number: The mini-batches; of every column each gets an equal share of the rows, but for one row.
        rows: The numbers of rows that a column may have, the largest first.
    """

    number: int
    rows: tuple[int, ...]

    @classmethod
    def of_pairs(cls, inputs: Mapping[str, Any], size: int | None) -> Split | None:
        """The split of a batch of pairs, or None without a size.

        The texts tell the number of pairs; in a batch without texts the first column does.

        Args:
            inputs: The columns of the batch.
            size: Pairs of a mini-batch, at most.
        """
        if size is None:
            return None
        columns = _tensors(inputs)
        first_column = next(iter(columns.values()))
        pairs = len(columns.get("input_ids", first_column))
        return cls(math.ceil(pairs / size), (pairs,))


@contextlib.contextmanager
def embedding_in(
    model: Any,
    split: Split | None,
    features_of: Callable[[Any], Features],
    of_model: Callable[[], Features] = dict,
) -> Iterator[None]:
    """Let a model embed its batches in mini-batches, and keep nothing but the embeddings.

    In the backward pass each mini-batch is embedded again, with the random numbers and the precision of the
    first time, and takes its part of the gradients of the embeddings. To all around the model this is one
    forward and one backward pass: DDP averages each gradient once, and the factors of a gradient scaler and
    of accumulated batches apply as ever.

    Within the context the model gives the features of the whole batch in place of its own output.

    Args:
        model: The model, without its wrappers. It is called by keywords, or with one dict of columns, beside
            which further arguments reach it with each mini-batch.
        split: The split of the batch. None leaves the model as it is.
        features_of: The embeddings in an output of the model, by name.
        of_model: Gives further features, which do not depend on the batch; by default none. As part of the
            model's output they are seen by DDP, which looks there for the parameters that a step uses.

    Raises:
        ValueError: The model is compiled as a whole; in its call, a column cannot be split.

    References:
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if split is None:
        yield
        return
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "mini_batch_size cannot split a model that is compiled as a whole; compile its towers"
        )
    holder, name = model, "forward"
    if hasattr(model.forward, "fn"):
        # MatryoshkaLoss keeps the output of the forward that it decorates: the batch is split beneath it.
        holder, name = model.forward, "fn"
    # A forward of this object, not of its class, is accelerate's, which adds mixed precision: it is put back.
    objects_own_forward = vars(holder).get(name)
    forward = getattr(holder, name)
    setattr(holder, name, functools.partial(_embedded, forward, split, features_of, of_model))
    try:
        yield
    finally:
        delattr(holder, name)
        if objects_own_forward is not None:
            setattr(holder, name, objects_own_forward)


def _embedded(
    forward: Callable[..., Any], split: Split, features_of: Any, of_model: Any, *args: Any, **inputs: Any
) -> Features:
    """The features of a batch, embedded in mini-batches, and those of the model."""
    batch = args[0] if args else inputs  # one dict of columns, or columns by keyword
    columns = _tensors(batch)
    _check_rows(batch, columns, split)

    def embed(*parts: Tensor) -> Features:
        mini_batch = {**batch, **dict(zip(columns, parts, strict=True))}
        output = forward(mini_batch, *args[1:], **inputs) if args else forward(**mini_batch)
        return features_of(output)  # type: ignore[no-any-return]

    parts_of_columns = [column.tensor_split(split.number) for column in columns.values()]
    mini_batches = zip(*parts_of_columns, strict=True)
    embedded = [checkpoint(embed, *parts, use_reentrant=False) for parts in mini_batches]
    features = {name: torch.cat([part[name] for part in embedded]) for name in embedded[0]}
    return {**features, **of_model()}


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a batch that have rows."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}


def _check_rows(batch: Mapping[str, Any], columns: Mapping[str, Tensor], split: Split) -> None:
    """Raise a ValueError for columns that cannot be split: lists, and tensors of another number of rows."""
    unsplit = [name for name, column in columns.items() if len(column) not in split.rows]
    # Unlike a tensor, a list is no column to split: it would reach the model whole, with each mini-batch.
    unsplit += [name for name, column in batch.items() if isinstance(column, list | tuple)]
    if unsplit:
        rows = " or ".join(str(number) for number in sorted({*split.rows}))
        raise ValueError(
            f"mini_batch_size cannot split {', '.join(unsplit)}: each column must be a tensor of {rows} rows"
        )
