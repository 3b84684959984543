"""Cached gradients: a model that embeds a batch in mini-batches, in the memory of one (GradCache)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Features = dict[str, Tensor]


@contextlib.contextmanager
def embedding_in(
    model: Any, size: int | None, features_of: Callable[[Any], Features], rows: Any = (1,), more: Any = dict
) -> Iterator[None]:
    """Let a model embed its batches in mini-batches, and keep nothing but the embeddings.

    In the backward pass each mini-batch is embedded again, with the random numbers and the precision of the
    first time, and takes its part of the gradients of the embeddings. To all around the model this is one
    forward and one backward pass: DDP averages each gradient once, and the factors of a gradient scaler and
    of accumulated batches apply as ever.

    Within the context the model gives the features of the whole batch in place of its own output.

    Args:
        model: The model, without its wrappers. It is called by keywords, or with one dict of columns.
        size: Pairs of a mini-batch, at most. None leaves the model as it is.
        features_of: The embeddings in an output of the model, by name.
        rows: The rows that a column may have for each pair.
        more: Further features, which do not depend on the batch. As part of the model's output they are seen
            by DDP, which looks there for the parameters that a step uses.

    Raises:
        ValueError: The model is compiled as a whole; in its call, a column cannot be split.

    References:
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if size is None:
        yield
        return
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "mini_batch_size cannot split a model that is compiled as a whole; compile its towers"
        )
    # MatryoshkaLoss keeps the output of the forward that it decorates: the batch is split beneath it.
    holder, name = (model.forward, "fn") if hasattr(model.forward, "fn") else (model, "forward")
    own = vars(holder).get(name)  # accelerate's forward, say, which adds mixed precision
    setattr(holder, name, functools.partial(_features, getattr(holder, name), size, features_of, rows, more))
    try:
        yield
    finally:
        delattr(holder, name)
        if own is not None:
            setattr(holder, name, own)


def _features(
    forward: Callable[..., Any], size: int, features_of: Any, rows: Any, more: Any, *args: Any, **inputs: Any
) -> Features:
    given = args[0] if args else inputs
    columns = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.ndim > 0}
    lengths = [len(x) for x in columns.values()]
    pairs = max(lengths, key=lambda n: sum(length in [n * k for k in rows] for length in lengths))
    unlike = [name for name, x in columns.items() if len(x) not in [pairs * k for k in rows]]
    unlike += [name for name, x in given.items() if isinstance(x, list | tuple)]
    if unlike:
        raise ValueError(f"mini_batch_size cannot split {', '.join(unlike)}: no rows of {pairs} pairs")

    def embed(*parts: Tensor) -> Features:
        part = {**given, **dict(zip(columns, parts, strict=True))}
        return features_of(forward(part) if args else forward(**part))  # type: ignore[no-any-return]

    number = -(-pairs // size)
    mini_batches = zip(*(x.tensor_split(number) for x in columns.values()), strict=True)
    embedded = [checkpoint(embed, *parts, use_reentrant=False) for parts in mini_batches]
    return {**{name: torch.cat([part[name] for part in embedded]) for name in embedded[0]}, **more()}
