"""Batches that are larger than memory: a model that embeds them in mini-batches (GradCache)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankloss_trainers.transformers.embeddings import embeddings_of, scale_of


@contextlib.contextmanager
def embedding_in(model: Any, size: int | None) -> Iterator[None]:
    """Let a model embed its batches in mini-batches, and keep nothing but the embeddings.

    In the backward pass each mini-batch is embedded again, with the random numbers and the precision of the
    first time, and takes its part of the gradients of the embeddings. To all around the model this is one
    forward and one backward pass: DDP averages each gradient once, and the factors of a gradient scaler and
    of accumulated batches apply as ever.

    Within the context the model gives what :func:`~rankloss_trainers.transformers.embeddings.features_of`
    gives of its output.

    Args:
        model: The model, without what it is wrapped in.
        size: Pairs of a mini-batch, at most. None leaves the model as it is.

    Raises:
        ValueError: The model is compiled as a whole; in its call, the batch cannot be split.

    References:
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if size is None:
        yield
        return
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "mini_batch_size does not work with a model that is compiled as a whole (torch_compile); compile "
            "its towers, model.vision_model.compile()"
        )
    own = vars(model).get("forward")  # accelerate's, which adds mixed precision
    model.forward = functools.partial(_features, model, model.forward, size)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _features(model: Any, forward: Callable[..., Any], size: int, **inputs: Any) -> dict[str, Tensor]:
    columns = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim > 0}
    pairs = min(len(x) for x in columns.values())
    if not {len(x) for x in columns.values()} <= {pairs, 2 * pairs}:  # two captions of each image
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in columns.items())
        raise ValueError(f"mini_batch_size needs columns with a row for each pair; got {shapes}")

    def embed(*rows: Tensor) -> dict[str, Tensor]:
        return embeddings_of(forward(**{**inputs, **dict(zip(columns, rows, strict=True))}))

    number = -(-pairs // size)
    mini_batches = zip(*(x.tensor_split(number) for x in columns.values()), strict=True)
    embedded = [checkpoint(embed, *rows, use_reentrant=False) for rows in mini_batches]
    features = {name: torch.cat([part[name] for part in embedded]) for name in embedded[0]}
    # Part of the output, where DDP looks for the parameters that a step uses.
    return {**features, **scale_of(model)}
