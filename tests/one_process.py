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

    @property
    def rows(self) -> slice:
        """The places of the anchors among the items."""
        return slice(self.first, self.first + len(self.image_anchors))


def clip(
    view: View, ids: Tensor | None = None, same_id: str = "share", label_smoothing: float = 0.0
) -> Tensor:
    """CLIP's loss: the mean of both directions' cross-entropies, with a target of probabilities.

    Of the items of an anchor's id, all share the target (``same_id="share"``), or the own item alone has it
    and the others are left out (``"ignore"``).
    """
    is_own, is_of_same_id = _is_own_and_of_same_id(view, ids)
    is_right = is_own if same_id == "ignore" else is_of_same_id
    is_counted = is_right | ~is_of_same_id
    directions = []
    for anchors, items in ((view.image_anchors, view.text), (view.text_anchors, view.image)):
        logits = view.scale * anchors @ items.T
        over_right, over_counted = _uniform(is_right, logits.dtype), _uniform(is_counted, logits.dtype)
        target = (1 - label_smoothing) * over_right + label_smoothing * over_counted
        log_sums = logits.masked_fill(~is_counted, -math.inf).logsumexp(1)
        directions.append((log_sums - (target * logits).sum(1)).mean())
    return sum(directions) / 2  # type: ignore[return-value]


def _uniform(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal probabilities of the chosen items of each row."""
    return chosen / chosen.sum(1, keepdim=True, dtype=dtype)


def siglip(view: View, bias: Tensor, ids: Tensor | None = None, same_id: str = "share") -> Tensor:
    """SigLIP's loss: −log σ(±logit), summed over the texts of each image, and the mean over the images.

    The sign is + for texts of the image's id. Of these its own alone counts with ``same_id="ignore"``.
    """
    # Texts are never rows. A process's own always have a gradient, even where gathered ones are constants.
    texts = torch.cat([view.text[: view.rows.start], view.text_anchors, view.text[view.rows.stop :]])
    logits = view.scale * view.image_anchors @ texts.T + bias
    is_own, is_of_same_id = _is_own_and_of_same_id(view, ids)
    terms = -F.logsigmoid(torch.where(is_of_same_id, logits, -logits))
    if same_id == "ignore":
        terms = terms[is_own | ~is_of_same_id]
    return terms.sum() / len(view.image_anchors)


def _is_own_and_of_same_id(view: View, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both ``[anchors, items]``: True at each anchor's own item, and at the items of its id."""
    items = torch.arange(len(view.image))
    is_own = items[view.rows, None] == items
    is_of_same_id = is_own if ids is None else ids[view.rows, None] == ids
    return is_own, is_of_same_id


def cross_modal(view: View, teacher: View | None = None) -> Tensor:
    """The cross-modal term: each direction is ranked by the other, or by a teacher's of the same."""
    similarities = _across(view)
    references = similarities[::-1] if teacher is None else _across(teacher)
    return _mean_nll(similarities, references, view)


def in_modal(view: View, teacher: View | None = None) -> Tensor:
    """The in-modal term: each modality is ranked by the other, or by a teacher's of the same."""
    similarities = _within(view)
    references = similarities[::-1] if teacher is None else _within(teacher)
    return _mean_nll(similarities, references, view)


def rank_terms(view: View, teacher: View | None = None) -> Tensor:
    """The sum of both terms."""
    return cross_modal(view, teacher) + in_modal(view, teacher)


def _across(view: View) -> tuple[Tensor, Tensor]:
    """Similarities of the anchors to the items of the other modality."""
    return view.image_anchors @ view.text.T, view.text_anchors @ view.image.T


def _within(view: View) -> tuple[Tensor, Tensor]:
    """Similarities of the anchors to the items of their own modality."""
    return view.image_anchors @ view.image.T, view.text_anchors @ view.text.T


def _mean_nll(similarities: tuple[Tensor, ...], references: tuple[Tensor, ...], view: View) -> Tensor:
    """The mean NLL of the lists of both matrices, in the orders of the references, per item of a list."""
    values = [
        plackett_luce_nll(view.scale * similarity, reference)
        for similarity, reference in zip(similarities, references, strict=True)
    ]
    return torch.stack(values).mean() / len(view.image)


def spread(view: View) -> Tensor:
    """The mean over the anchors of both modalities of the standard deviation over the other items.

    The scale is a constant in it.
    """
    scale = view.scale.detach()
    is_own, _ = _is_own_and_of_same_id(view, ids=None)
    deviations = []
    for similarities in _within(view):
        others = (scale * similarities)[~is_own].view(len(similarities), -1)
        variances = others.var(-1, unbiased=False)
        epsilon = 1e-9 * scale**2  # of rankloss.spread, for similarities that are multiplied by the scale
        deviations.append((variances + epsilon).sqrt().mean())
    return torch.stack(deviations).mean()


def rank_clip(view: View) -> Tensor:
    """CLIP's loss and both rank terms, each with the weight 1."""
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
        """The features of all processes, as process ``rank`` has them."""
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
