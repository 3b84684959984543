"""Row lists as an operator of torch's: the streaming pass with its autograd, opaque to a compiler.

``rankloss::row_lists`` computes the weighted terms and, where a gradient is wanted, the gradient of their sum
in the same pass; what is kept for the backward pass are the embeddings and that gradient, in O(N·D).

The backward pass is handed one upstream value per term. As a rule they are one and the same, since a loss is
the sum of its terms, and the gradient is multiplied by it. Where they differ, or a term is not used, or every
anchor has an upstream value of its own (``reduction="none"``), the backward pass walks over the rows once
more. A backward pass that is itself to be differentiated (``create_graph=True``) goes through
:mod:`rankloss.dense` and takes quadratic memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from rankloss import dense
from rankloss.embeddings import Embeddings, Term
from rankloss.options import ConsistencyOptions
from rankloss.plans import choose_plan
from rankloss.streaming import Gradients, Problem, Weights, stream

__all__ = ["TERMS", "row_lists"]

TERMS = ("contrastive", "cross_modal", "in_modal")
_INPUTS = "Tensor image, Tensor text, Tensor? image_anchors, Tensor? text_anchors, Tensor scale"
_SETTINGS = "Tensor weights, Tensor? shuffles, int first_row, bool[] terms, bool[] wanted, str options"


def row_lists(
    embeddings: Embeddings,
    options: ConsistencyOptions,
    weights: Tensor,
    terms: Sequence[bool],
    shuffles: Tensor | None = None,
    first_row: int = 0,
) -> tuple[Tensor, ...]:
    """The weighted terms, one for each of :data:`TERMS`.

    Args:
        embeddings: the batch.
        options: of the rank terms.
        weights: ``[3]``, on the CPU; what each term is multiplied by, as a tensor so that a compiled graph is
            not compiled anew when they change. They take no gradient.
        terms: which of them are wanted; the others are zero.
        shuffles: ``[4, N]`` under ``ties="random"``, for the lists of S, R, I and X; else None.
        first_row: the first anchor's own place among the items.

    Returns:
        Scalars, or ``[n]`` each with ``reduction="none"``.
    """
    e = embeddings
    inputs = (e.image, e.text, e.image_anchors, e.text_anchors, e.scale)
    grad_enabled = torch.is_grad_enabled()
    wanted = [grad_enabled and x is not None and x.requires_grad for x in inputs]
    outputs: tuple[Tensor, ...] = torch.ops.rankloss.row_lists(
        *inputs, weights, shuffles, first_row, list(terms), wanted, options.encoded
    )
    return outputs[: len(TERMS)]


@torch.library.custom_op(
    "rankloss::row_lists",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    image: Tensor,
    text: Tensor,
    image_anchors: Tensor | None,
    text_anchors: Tensor | None,
    scale: Tensor,
    weights: Tensor,
    shuffles: Tensor | None,
    first_row: int,
    terms: Sequence[bool],
    wanted: Sequence[bool],
    options: str,
) -> tuple[Tensor, ...]:
    embeddings = Embeddings(image, text, scale, image_anchors, text_anchors)
    parsed = ConsistencyOptions.decode(options)
    with_gradient = any(wanted) and parsed.reduction != "none"
    scaled = [
        torch.full((), w * _anchor_weight(term, embeddings, parsed), dtype=torch.float64, device=image.device)
        if is_wanted
        else None
        for term, w, is_wanted in zip(TERMS, weights.tolist(), terms, strict=True)
    ]
    values, gradients = _run(embeddings, parsed, scaled, shuffles, first_row, wanted if with_gradient else ())
    return (*(_reduced(value, embeddings, parsed) for value in values), *gradients)


@_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (wanted, options) = arguments[:5], arguments[-2:]
    image, _, image_anchors, *_ = inputs
    per_anchor = ConsistencyOptions.decode(options).reduction == "none"
    anchors = image if image_anchors is None else image_anchors
    values = (image.new_empty((anchors.shape[0],) if per_anchor else ()) for _ in TERMS)
    return (*values, *_placeholders(inputs, () if per_anchor else wanted, torch.empty_like))


@torch.library.custom_op(
    "rankloss::row_lists_backward",
    mutates_args=(),
    schema=f"(Tensor?[] upstream, Tensor[] sums, {_INPUTS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    upstream: Sequence[Tensor | None],
    sums: Sequence[Tensor],
    image: Tensor,
    text: Tensor,
    image_anchors: Tensor | None,
    text_anchors: Tensor | None,
    scale: Tensor,
    weights: Tensor,
    shuffles: Tensor | None,
    first_row: int,
    terms: Sequence[bool],
    wanted: Sequence[bool],
    options: str,
) -> tuple[Tensor, ...]:
    given = [g for g, is_wanted in zip(upstream, terms, strict=True) if is_wanted]
    common = _common(given) if sums else None
    if common is not None:
        return tuple(x * common if w else x.clone() for x, w in zip(sums, wanted, strict=True))
    embeddings = Embeddings(image, text, scale, image_anchors, text_anchors)
    parsed = ConsistencyOptions.decode(options)
    scaled = [
        g.double() * (w * _anchor_weight(term, embeddings, parsed)) if is_wanted and g is not None else None
        for term, w, g, is_wanted in zip(TERMS, weights.tolist(), upstream, terms, strict=True)
    ]
    return _run(embeddings, parsed, scaled, shuffles, first_row, wanted)[1]


@_backward.register_fake
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _placeholders(arguments[2:7], arguments[-2], torch.empty_like)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_row, terms, wanted, options = inputs
    sums = output[len(TERMS) :]
    ctx.set_materialize_grads(False)
    ctx.has_sums = ConsistencyOptions.decode(options).reduction != "none"
    ctx.save_for_backward(*tensors, *(sums if ctx.has_sums else ()))
    ctx.settings = (first_row, terms, wanted, options)


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    tensors, sums = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    first_row, terms, wanted, options = ctx.settings
    if torch.is_grad_enabled():  # create_graph=True
        gradients = _differentiable_gradients(upstream[: len(TERMS)], tensors, *ctx.settings)
    else:
        found = torch.ops.rankloss.row_lists_backward(
            list(upstream[: len(TERMS)]), list(sums), *tensors, first_row, terms, wanted, options
        )
        gradients = [g if w else None for g, w in zip(found, wanted, strict=True)]
    return (*gradients, *(None,) * 6)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _differentiable_gradients(
    upstream: Sequence[Tensor | None],
    tensors: Sequence[Any],
    first_row: int,
    terms: Sequence[bool],
    wanted: Sequence[bool],
    options: str,
) -> list[Tensor | None]:
    """Gradients that carry a graph of their own."""
    image, text, image_anchors, text_anchors, scale, weights, shuffles = tensors
    embeddings = Embeddings(image, text, scale, image_anchors, text_anchors)
    parsed = ConsistencyOptions.decode(options)
    values = []
    with torch.autocast(device_type=image.device.type, enabled=False):
        for k, (name, weight, is_wanted) in enumerate(zip(TERMS, weights.tolist(), terms, strict=True)):
            if upstream[k] is None or not is_wanted:
                continue
            if k == 0:
                value = dense.row_lists_cross_entropy(embeddings, first_row)
            else:
                term = get_args(Term)[k - 1]
                pair = (None, None) if shuffles is None else (shuffles[2 * k - 2], shuffles[2 * k - 1])
                value = dense.row_lists_nll(embeddings, term, parsed.likelihood, pair, parsed.bins_or_none)
            value = value * (weight * _anchor_weight(name, embeddings, parsed)) * embeddings.nan_unless_finite
            values.append(value if parsed.reduction == "none" else value.sum())
    inputs = (image, text, image_anchors, text_anchors, scale)
    by = [x for x, w in zip(inputs, wanted, strict=True) if w]
    given = [g for g, w in zip(upstream, terms, strict=True) if g is not None and w]
    gradients = iter(torch.autograd.grad(values, by, given, create_graph=True, allow_unused=True))
    return [next(gradients) if w else None for w in wanted]


def _run(
    embeddings: Embeddings,
    options: ConsistencyOptions,
    weights: list[Tensor | None],
    shuffles: Tensor | None,
    first_row: int,
    wanted: Sequence[bool],
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Weighted values per anchor, and gradients in the order of the inputs, empty where none is wanted."""
    e = embeddings
    inputs = (e.image, e.text, e.image_anchors, e.text_anchors, e.scale)
    sums = _placeholders(inputs, wanted, torch.zeros_like)
    plan = choose_plan(
        e.anchors,
        len(e.image),
        e.image.device,
        e.image.dtype,
        chunk_size=options.chunk_size,
        memory_budget=options.memory_budget,
    )
    problem = Problem(options.likelihood, options.bins_or_none, plan, first_row)
    nan_unless_finite = e.nan_unless_finite
    weights = [None if w is None else w * nan_unless_finite for w in weights]
    targets = Gradients(*(x if w else None for x, w in zip(sums, wanted, strict=True))) if wanted else None
    values = stream(e, shuffles, problem, Weights(*weights), targets)
    weighted = [None if v is None or w is None else v * w for v, w in zip(values, weights, strict=True)]
    return weighted, sums


def _anchor_weight(term: str, embeddings: Embeddings, options: ConsistencyOptions) -> float:
    """What an anchor's value is multiplied by before the anchors are summed."""
    n, anchors = len(embeddings.image), embeddings.anchors
    if term == "contrastive":
        return 1 / anchors
    return {"mean": 1 / (anchors * n), "sum": n / anchors, "none": 1.0}[options.reduction]


def _reduced(value: Tensor | None, embeddings: Embeddings, options: ConsistencyOptions) -> Tensor:
    if options.reduction == "none":
        return embeddings.image.new_zeros(embeddings.anchors) if value is None else value.to(embeddings.image)
    return embeddings.image.new_zeros(()) if value is None else value.sum().to(embeddings.image)


def _placeholders(inputs: Sequence[Tensor | None], wanted: Sequence[bool], make: Any) -> tuple[Tensor, ...]:
    """``make(x)`` for every input whose gradient is wanted, and an empty tensor for the others."""
    like = inputs[0]
    assert like is not None
    wanted = wanted or [False] * len(inputs)
    return tuple(
        make(x) if x is not None and w else like.new_empty(0) for x, w in zip(inputs, wanted, strict=True)
    )


def _common(upstream: Sequence[Tensor | None]) -> Tensor | None:
    """The upstream value that all terms share; None where they do not, or it would take a wait to know."""
    first, *others = upstream
    if first is None or any(g is None for g in others):
        return None
    for g in others:
        assert g is not None
        same = g.data_ptr() == first.data_ptr() or (first.device.type == "cpu" and torch.equal(g, first))
        if not same:
            return None
    return first
