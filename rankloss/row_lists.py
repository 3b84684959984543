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
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rankloss import dense
from rankloss.embeddings import Embeddings, Term
from rankloss.options import RankOptions
from rankloss.streaming import Gradients, Problem, Weights, stream

__all__ = ["TERMS", "row_lists"]

TERMS = ("contrastive", "cross_modal", "in_modal")
_INPUTS = "Tensor image, Tensor text, Tensor? image_anchors, Tensor? text_anchors, Tensor scale"
_SETTINGS = "Tensor weights, Tensor? shuffles, int first_row, bool[] terms, bool[] wanted, str options"


def row_lists(
    embeddings: Embeddings,
    options: RankOptions,
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


class _Call(NamedTuple):
    """The arguments that both operators share, in the order of their schemas."""

    image: Tensor
    text: Tensor
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor
    weights: Tensor
    shuffles: Tensor | None
    first_row: int
    terms: Sequence[bool]
    wanted: Sequence[bool]
    options: str

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What takes a gradient."""
        return self.image, self.text, self.image_anchors, self.text_anchors, self.scale

    @property
    def embeddings(self) -> Embeddings:
        return Embeddings(self.image, self.text, self.scale, self.image_anchors, self.text_anchors)

    @property
    def parsed(self) -> RankOptions:
        return RankOptions.decode(self.options)

    @property
    def per_anchor(self) -> bool:
        """Whether every anchor has a value of its own, and an upstream value that is not known yet."""
        return self.parsed.reduction == "none"

    @property
    def anchors(self) -> int:
        return (self.image if self.image_anchors is None else self.image_anchors).shape[0]

    def anchor_weights(self) -> list[float | None]:
        """What an anchor's value counts in each term; None for a term that is not wanted."""
        rank = self.parsed.anchor_weight(self.anchors, len(self.image))
        shares = (1 / self.anchors, rank, rank)
        return [
            weight * share if is_wanted else None
            for weight, share, is_wanted in zip(self.weights.tolist(), shares, self.terms, strict=True)
        ]


@torch.library.custom_op(
    "rankloss::row_lists",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    weights = [
        None if w is None else torch.full((), w, dtype=torch.float64, device=call.image.device)
        for w in call.anchor_weights()
    ]
    with_gradient = any(call.wanted) and not call.per_anchor
    values, gradients = _run(call, weights, call.wanted if with_gradient else ())
    return (*(_reduced(value, call) for value in values), *gradients)


@_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    values = (call.image.new_empty((call.anchors,) if call.per_anchor else ()) for _ in TERMS)
    wanted = () if call.per_anchor else call.wanted
    return (*values, *_placeholders(call.inputs, wanted, torch.empty_like))


@torch.library.custom_op(
    "rankloss::row_lists_backward",
    mutates_args=(),
    schema=f"(Tensor?[] upstream, Tensor[] sums, {_INPUTS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    upstream: Sequence[Tensor | None], sums: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    given = [g for g, is_wanted in zip(upstream, call.terms, strict=True) if is_wanted]
    common = _common(given) if sums else None
    if common is not None:
        return tuple(x * common if w else x.clone() for x, w in zip(sums, call.wanted, strict=True))
    weights = [
        None if w is None or g is None else g.double() * w
        for w, g in zip(call.anchor_weights(), upstream, strict=True)
    ]
    return _run(call, weights, call.wanted)[1]


@_backward.register_fake
def _backward_fake(_upstream: Any, _sums: Any, *arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    return _placeholders(call.inputs, call.wanted, torch.empty_like)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_row, terms, wanted, options = inputs
    ctx.set_materialize_grads(False)
    sums = () if _Call(*inputs).per_anchor else output[len(TERMS) :]
    ctx.save_for_backward(*tensors, *sums)
    ctx.settings = (first_row, terms, wanted, options)


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    call, sums = _Call(*ctx.saved_tensors[:7], *ctx.settings), ctx.saved_tensors[7:]
    of_terms = list(upstream[: len(TERMS)])
    if torch.is_grad_enabled():  # create_graph=True
        gradients = _differentiable_gradients(of_terms, call)
    else:
        found = torch.ops.rankloss.row_lists_backward(of_terms, list(sums), *call)
        gradients = [g if w else None for g, w in zip(found, call.wanted, strict=True)]
    return (*gradients, *(None,) * (len(call) - len(gradients)))


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _differentiable_gradients(upstream: Sequence[Tensor | None], call: _Call) -> list[Tensor | None]:
    """Gradients that carry a graph of their own."""
    embeddings, options, shuffles = call.embeddings, call.parsed, call.shuffles
    values, given = [], []
    with torch.autocast(device_type=call.image.device.type, enabled=False):
        nan_unless_finite = embeddings.nan_unless_finite
        for k, (weight, g) in enumerate(zip(call.anchor_weights(), upstream, strict=True)):
            if weight is None or g is None:
                continue
            if k == 0:
                value = dense.row_lists_cross_entropy(embeddings, call.first_row)
            else:
                term = get_args(Term)[k - 1]
                pair = (None, None) if shuffles is None else (shuffles[2 * k - 2], shuffles[2 * k - 1])
                value = dense.row_lists_nll(embeddings, term, options, pair, call.first_row)
            value = value * weight * nan_unless_finite
            values.append(value if call.per_anchor else value.sum())
            given.append(g)
    by = [x for x, w in zip(call.inputs, call.wanted, strict=True) if x is not None and w]
    gradients = iter(torch.autograd.grad(values, by, given, create_graph=True, allow_unused=True))
    return [next(gradients) if w else None for w in call.wanted]


def _run(
    call: _Call, weights: list[Tensor | None], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Weighted values per anchor, and gradients in the order of the inputs, empty where none is wanted."""
    embeddings, options, image = call.embeddings, call.parsed, call.image
    sums = _placeholders(call.inputs, wanted, torch.zeros_like)
    plan = options.plan(call.anchors, len(image), image.device, image.dtype)
    problem = Problem(options, plan, call.first_row)
    nan_unless_finite = embeddings.nan_unless_finite
    weights = [None if w is None else w * nan_unless_finite for w in weights]
    targets = Gradients(*(x if w else None for x, w in zip(sums, wanted, strict=True))) if wanted else None
    values = stream(embeddings, call.shuffles, problem, Weights(*weights), targets)
    weighted = [None if v is None or w is None else v * w for v, w in zip(values, weights, strict=True)]
    return weighted, sums


def _reduced(value: Tensor | None, call: _Call) -> Tensor:
    if value is None:
        return call.image.new_zeros(call.anchors if call.per_anchor else ())
    return (value if call.per_anchor else value.sum()).to(call.image)


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
