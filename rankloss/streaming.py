r"""Row lists in O(chunk·N + N·D) memory: a rank term computed a few rows at a time, its gradient with it.

The forward pass walks over chunks of anchors. For each it forms the chunk's similarities, takes value and
gradient of every list from one sort (:func:`rankloss.plackett_luce.nll_and_gradient`), and adds the gradient
into those of the embeddings at once; the chunk's matrices are then dropped. What is kept for the backward
pass are the embeddings and their gradient, and the backward pass multiplies that by its upstream value.

With G the gradient by the scores x = s·C, C = Q·Kᵀ (anchors Q, items K):

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C.

With one value per anchor (``reduction="none"``) the upstream value is not known in advance, so there the
backward pass walks once more. A backward pass that is itself to be differentiated (``create_graph=True``)
goes through :mod:`rankloss.dense` and takes quadratic memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss import dense
from rankloss.embeddings import Embeddings, Similarity, Term, scores_from
from rankloss.plackett_luce import ListOptions, nll_and_gradient, nll_terms

__all__ = ["default_chunk_size", "row_lists_nll"]

_BLOCK = {"cpu": 2**20}  # elements of one chunk's similarity matrix: about what a CPU's cache can serve
_BLOCK_ELSEWHERE = 2**24  # an accelerator wants more work at a time: 64 MB in float32


def default_chunk_size(n: int, device: torch.device) -> int:
    """Anchors per chunk for lists of n items.

    Example:
        >>> default_chunk_size(4096, torch.device("cpu"))
        256
    """
    return max(1, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // n)


def row_lists_nll(
    embeddings: Embeddings,
    term: Term,
    options: ListOptions,
    shuffles: dense.Shuffles,
    *,
    chunk_size: int | None = None,
    anchor_weight: float | None = None,
) -> Tensor:
    """The lists' NLL, averaged over the two directions.

    Args:
        embeddings: the batch.
        term: which matrices to compare.
        options: the lists' likelihood.
        shuffles: one per direction, from :func:`rankloss.plackett_luce.random_shuffle`.
        chunk_size: anchors per chunk; None chooses from the sizes and the device.
        anchor_weight: what every anchor's value is multiplied by before they are summed; None does not sum.

    Returns:
        A scalar, or ``[n]`` where ``anchor_weight`` is None.
    """
    e = embeddings
    chunk_size = chunk_size or default_chunk_size(len(e.image), e.image.device)
    plan = _Plan(term, options, shuffles, chunk_size, anchor_weight, e.first_equal_image, e.first_equal_text)
    result: Tensor = _RowListsNLL.apply(  # type: ignore[no-untyped-call]
        e.image, e.text, e.image_anchors, e.text_anchors, e.scale, plan, torch.is_grad_enabled()
    )
    return result


class _Plan(NamedTuple):
    """What one call computes, apart from the tensors that it differentiates by."""

    term: Term
    options: ListOptions
    shuffles: dense.Shuffles
    chunk_size: int
    anchor_weight: float | None
    first_equal_image: Tensor | None
    first_equal_text: Tensor | None

    def embeddings(
        self, image: Tensor, text: Tensor, v: Tensor | None, t: Tensor | None, s: Tensor
    ) -> Embeddings:
        return Embeddings(image, text, s, v, t, self.first_equal_image, self.first_equal_text)


class _Gradients(NamedTuple):
    """Gradients of the five tensor inputs, in their order; None where none is wanted."""

    image: Tensor | None
    text: Tensor | None
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor | None


def _zeros(e: Embeddings, wanted: tuple[bool, ...]) -> _Gradients:
    inputs = (e.image, e.text, e.image_anchors, e.text_anchors, e.scale)
    return _Gradients(
        *(torch.zeros_like(x) if x is not None and w else None for x, w in zip(inputs, wanted, strict=True))
    )


class _RowListsNLL(torch.autograd.Function):
    """Inputs: image, text, image_anchors, text_anchors (or None), scale; the plan; whether autograd is on."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, plan, grad_enabled = arguments
        ctx.plan = plan
        embeddings = plan.embeddings(*inputs)
        if plan.anchor_weight is None:
            ctx.save_for_backward(*inputs)
            return _stream(embeddings, plan)
        wanted = ctx.needs_input_grad[:5] if grad_enabled else ()
        gradients = _zeros(embeddings, wanted) if any(wanted) else None
        values = _stream(embeddings, plan, plan.anchor_weight, gradients)
        if gradients is not None:
            ctx.save_for_backward(*inputs, *gradients)
        total: Tensor = values.sum() * plan.anchor_weight
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = upstream
        inputs, saved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph=True
            return (*_dense_gradients(inputs, ctx.plan, g, wanted), None, None)
        if saved:
            return (*(None if x is None else x * g for x in saved), None, None)
        embeddings = ctx.plan.embeddings(*inputs)
        gradients = _zeros(embeddings, wanted)
        _stream(embeddings, ctx.plan, g, gradients)
        return (*gradients, None, None)


def _dense_gradients(
    inputs: tuple[Any, ...], plan: _Plan, upstream: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients that carry a graph of their own."""
    embeddings = plan.embeddings(*inputs)
    with torch.autocast(device_type=upstream.device.type, enabled=False):
        value = dense.row_lists_nll(embeddings, plan.term, plan.options, plan.shuffles)
        if plan.anchor_weight is not None:
            value = value.sum() * plan.anchor_weight
    by = [x for x, w in zip(inputs, wanted, strict=True) if w]
    gradients = iter(torch.autograd.grad(value, by, upstream, create_graph=True, allow_unused=True))
    return [next(gradients) if w else None for w in wanted]


def _stream(
    embeddings: Embeddings,
    plan: _Plan,
    anchor_weight: Tensor | float = 1.0,
    gradients: _Gradients | None = None,
) -> Tensor:
    """NLL per anchor; adds the gradient of Σ anchor_weight·NLL into the tensors of ``gradients``."""
    lists = embeddings.lists(plan.term)
    n = len(lists.first.anchors)
    values = embeddings.image.new_zeros(n)
    # An enclosing autocast region would turn these products into half precision.
    with torch.autocast(device_type=values.device.type, enabled=False):
        for start in range(0, n, plan.chunk_size):
            rows = slice(start, start + plan.chunk_size)
            pair = (lists.first.rows(rows), lists.second.rows(rows))
            cosines = (pair[0].cosines(), pair[1].cosines())
            for i, j in ((0, 1), (1, 0)):
                scores = scores_from(cosines[i], embeddings.scale, plan.options)
                reference = pair[j].reference(cosines[j])
                likelihood = (scores, reference, plan.options, plan.shuffles[i])
                if gradients is None:
                    values[rows] += nll_terms(*likelihood).sum(-1) / 2
                    continue
                nll, gradient = nll_and_gradient(*likelihood)
                values[rows] += nll / 2
                gradient *= (
                    anchor_weight[rows, None] if isinstance(anchor_weight, Tensor) else anchor_weight
                ) / 2
                into = _targets(embeddings, gradients, plan.term, i)
                _accumulate(pair[i], cosines[i], gradient, embeddings.scale, plan.options, rows, into)
    return values


class _Targets(NamedTuple):
    anchors: Tensor | None
    items: Tensor | None
    scale: Tensor | None


def _targets(embeddings: Embeddings, gradients: _Gradients, term: Term, i: int) -> _Targets:
    """Where the gradient of matrix i goes, by the factors of S = V·Tᵀ, R = T·Vᵀ and of I = V·Vᵀ, X = T·Tᵀ."""
    items = (gradients.image, gradients.text)
    separate = embeddings.image_anchors is not None
    anchors = (gradients.image_anchors, gradients.text_anchors) if separate else items
    return _Targets(anchors[i], items[1 - i] if term == "cross_modal" else items[i], gradients.scale)


def _accumulate(
    similarity: Similarity,
    cosines: Tensor,
    gradient: Tensor,
    scale: Tensor,
    options: ListOptions,
    rows: slice,
    into: _Targets,
) -> None:
    """Add one chunk's share to the gradients of anchors, items and scale; ``gradient`` is used up."""
    if options.worth == "exp":
        if into.scale is not None:
            into.scale.add_((gradient * cosines).sum())
        gradient *= scale
    if into.anchors is not None:
        into.anchors[rows].addmm_(gradient, similarity.items)
    if into.items is not None:
        into.items.addmm_(gradient.T, similarity.anchors)
