"""The computation of W processes in one: the flags' rules and the losses in plain torch, no gathering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import plackett_luce_nll


@dataclass(frozen=True)
class View:
    """A process's part of a batch: its anchors, and the items that all anchors are compared with."""

    image: Tensor
    text: Tensor
    scale: Tensor
    image_anchors: Tensor
    text_anchors: Tensor
    first: int  # position of the first anchor among the items


def clip(view: View) -> Tensor:
    target = view.first + torch.arange(len(view.image_anchors))
    logits = (view.image_anchors @ view.text.T, view.text_anchors @ view.image.T)
    return sum(F.cross_entropy(view.scale * x, target) for x in logits) / 2  # type: ignore[return-value]


def cross(view: View) -> Tensor:
    return _lists(view, view.image_anchors @ view.text.T, view.text_anchors @ view.image.T)


def in_(view: View) -> Tensor:
    return _lists(view, view.image_anchors @ view.image.T, view.text_anchors @ view.text.T)


def rank_terms(view: View) -> Tensor:
    return cross(view) + in_(view)


def _lists(view: View, a: Tensor, b: Tensor) -> Tensor:
    nll = plackett_luce_nll(view.scale * a, b) + plackett_luce_nll(view.scale * b, a)
    return nll.mean() / 2 / len(view.image)


def rank_clip(view: View) -> Tensor:
    return clip(view) + rank_terms(view)


def mean_loss(
    loss: Callable[[View], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    world_size: int,
    local_loss: bool,
    gather_with_grad: bool,
) -> Tensor:
    """The mean of the processes' losses, whose gradient is what DDP makes of theirs.

    Process r's loss sees the features of process w ≠ r with their graph if ``gather_with_grad``, and as
    constants otherwise; its own as constants too, unless they are anchors or not ``local_loss``. One process
    alone has nobody to gather from, and no use for the flags.
    """

    def gathered(features: Tensor, rank: int) -> Tensor:
        if gather_with_grad or world_size == 1:
            return features
        chunks = [x.detach() for x in features.chunk(world_size)]
        if not local_loss:
            chunks[rank] = features.chunk(world_size)[rank]
        return torch.cat(chunks)

    v, t, s = inputs
    values = []
    for rank in range(world_size):
        items = (gathered(v, rank), gathered(t, rank))
        anchors = (v.chunk(world_size)[rank], t.chunk(world_size)[rank]) if local_loss else items
        first = rank * len(anchors[0]) if local_loss else 0
        values.append(loss(View(*items, s, *anchors, first)))
    return torch.stack(values).mean()
