"""The computation of W processes in one: the flags' rules and the losses in plain torch, no gathering."""

from __future__ import annotations

import math
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


def clip(
    view: View, ids: Tensor | None = None, same_id: str = "share", label_smoothing: float = 0.0
) -> Tensor:
    own, same = _own_and_same(view, ids)
    right = own if same_id == "ignore" else same
    values = []
    for a, b in ((view.image_anchors, view.text), (view.text_anchors, view.image)):
        logits, counted = view.scale * a @ b.T, right | ~same
        target, spread = (x / x.sum(1, keepdim=True, dtype=logits.dtype) for x in (right, counted))
        target = (1 - label_smoothing) * target + label_smoothing * spread
        log_sums = logits.masked_fill(~counted, -math.inf).logsumexp(1)
        values.append((log_sums - (target * logits).sum(1)).mean())
    return sum(values) / 2  # type: ignore[return-value]


def siglip(view: View, bias: Tensor, ids: Tensor | None = None, same_id: str = "share") -> Tensor:
    # A text has no row that would carry its gradient: a process's own texts always have one.
    first, n = view.first, len(view.text_anchors)
    texts = torch.cat([view.text[:first], view.text_anchors, view.text[first + n :]])
    logits, (own, same) = view.scale * view.image_anchors @ texts.T + bias, _own_and_same(view, ids)
    terms = -F.logsigmoid(torch.where(same, logits, -logits))
    return (terms[own | ~same] if same_id == "ignore" else terms).sum() / n


def _own_and_same(view: View, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """True at each anchor's own item, and at the items of its id."""
    rows = view.first + torch.arange(len(view.image_anchors))
    own = rows[:, None] == torch.arange(len(view.image))
    return own, own if ids is None else ids[rows, None] == ids


def cross(view: View) -> Tensor:
    return _lists(view, view.image_anchors @ view.text.T, view.text_anchors @ view.image.T)


def in_(view: View) -> Tensor:
    return _lists(view, view.image_anchors @ view.image.T, view.text_anchors @ view.text.T)


def rank_terms(view: View) -> Tensor:
    return cross(view) + in_(view)


def _lists(view: View, a: Tensor, b: Tensor) -> Tensor:
    nll = plackett_luce_nll(view.scale * a, b) + plackett_luce_nll(view.scale * b, a)
    return nll.mean() / 2 / len(view.image)


def spread(view: View) -> Tensor:
    """The mean over the anchors of both modalities of the standard deviation over the other items.

    The scale is a constant in it.
    """
    deviations, scale = [], view.scale.detach()
    for anchors, items in ((view.image_anchors, view.image), (view.text_anchors, view.text)):
        similarities = scale * anchors @ items.T
        rows = view.first + torch.arange(len(anchors))
        others = similarities[rows[:, None] != torch.arange(len(items))].view(len(anchors), -1)
        variances = others.var(-1, unbiased=False)
        deviations.append((variances + 1e-9 * scale**2).sqrt().mean())
    return torch.stack(deviations).mean()


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
