"""Row lists as an operator of torch's: the streaming pass with its autograd, opaque to a compiler.

``rankloss::row_lists`` computes the weighted terms and, where a gradient is wanted, the gradient of their sum
in the same pass; what is kept for the backward pass are the embeddings and that gradient, in O(N·D).

The backward pass gets one upstream value per term. As a rule they are one and the same, since a loss is the
sum of its terms, and the gradient is multiplied by it. Where they differ, or a term is not used, or every
anchor has an upstream value of its own (``reduction="none"``), the backward pass walks over the rows once
more. A backward pass that is itself to be differentiated (``create_graph=True``) goes through
:mod:`rankloss.dense` and takes quadratic memory.
Forward-mode differentiation is refused where the batch is made, since it would find no derivative here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss import dense
from rankloss.batch import Batch, Inputs
from rankloss.options import RankOptions
from rankloss.precision import full_precision
from rankloss.streaming import Terms, stream

__all__ = ["row_lists"]

_INPUTS = "Tensor image, Tensor text, Tensor? image_anchors, Tensor? text_anchors, Tensor scale"
_SETTINGS = (
    "Tensor weights, Tensor? shuffles, Tensor? reference_image, Tensor? reference_text, "
    "int first_row, bool[] terms, bool[] wanted, str options"
)
_N_TERMS, _N_TENSORS = len(Terms._fields), 9


def row_lists(
    batch: Batch,
    options: RankOptions,
    weights: Tensor,
    terms: Sequence[bool],
    shuffles: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The weighted terms: CLIP's cross-entropy, the cross-modal and the in-modal one.

    Args:
        batch: the features.
        options: of the rank terms.
        weights: ``[3]``, float64, on the device of the features; what each term is multiplied by. A compiled
            or captured graph follows it, since it is a tensor. It takes no gradient.
        terms: which of them are wanted; the others are zero.
        shuffles: ``[4, N]`` under ``ties="random"``, for the lists of S, R, I and X; else None.

    Returns:
        Scalars, or ``[n]`` each with ``reduction="none"``.
    """
    inputs = batch.inputs
    grad_enabled = torch.is_grad_enabled()
    wanted = [grad_enabled and x is not None and x.requires_grad for x in inputs]
    outputs: tuple[Tensor, ...] = torch.ops.rankloss.row_lists(
        *inputs,
        weights,
        shuffles,
        batch.reference_image,
        batch.reference_text,
        batch.first_row,
        list(terms),
        wanted,
        options.encoded,
    )
    return outputs[:_N_TERMS]


class _Call(NamedTuple):
    """The arguments that both operators share, in the order of their schemas."""

    image: Tensor
    text: Tensor
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor
    weights: Tensor
    shuffles: Tensor | None
    reference_image: Tensor | None
    reference_text: Tensor | None
    first_row: int
    terms: Sequence[bool]
    wanted: Sequence[bool]
    options: str

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.image, self.text, self.image_anchors, self.text_anchors, self.scale)

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

    def unpacked(self, upstream: Sequence[Tensor | None] | None = None) -> tuple[Batch, Terms]:
        """The batch, and what an anchor's value counts in each term.

        It is ``[]``, or with an upstream value per anchor ``[n]``; None for a term that is not wanted, or has
        no upstream value. Where a feature is not finite it is NaN.
        """
        batch = Batch(
            self.image,
            self.text,
            self.scale,
            self.image_anchors,
            self.text_anchors,
            self.first_row,
            reference_image=self.reference_image,
            reference_text=self.reference_text,
        )
        of_rank = self.parsed.anchor_weight(self.anchors, len(self.image))
        weights = batch.nan_unless_finite(self.weights)
        shares = 1 / self.anchors, of_rank, of_rank
        by_share = {share: weights * share for share in shares}  # as a rule they have one and the same
        of_terms: list[Tensor | None] = []
        for k, share in enumerate(shares):
            g = None if upstream is None else upstream[k]
            if not self.terms[k] or (upstream is not None and g is None):
                of_terms.append(None)
            else:
                weight = by_share[share][k]
                of_terms.append(weight if g is None else g.double() * weight)
        return batch, Terms(*of_terms)


@torch.library.custom_op(
    "rankloss::row_lists",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    batch, weights = call.unpacked()
    values, sums, factor = _run(call, batch, weights, () if call.per_anchor else call.wanted)
    remaining = iter(values if call.per_anchor else values.sum(-1))
    terms = []
    for weight in weights:
        if weight is None:
            terms.append(batch.image.new_zeros(call.anchors if call.per_anchor else ()))
        else:
            value = next(remaining)
            terms.append(torch.mul(value, weight, out=batch.image.new_empty(value.shape)))
    return (*terms, *sums, factor)


@_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    values = (call.image.new_empty((call.anchors,) if call.per_anchor else ()) for _ in Terms._fields)
    factor = call.image.new_empty((), dtype=torch.float64)
    return (*values, *_run_fake(call, () if call.per_anchor else call.wanted), factor)


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
    if common is None:
        _, found, factor = _run(call, *call.unpacked(upstream), call.wanted)
        for x in found[:-1]:
            x *= factor
        return found
    *by_features, by_scale, factor = sums
    factor = factor * common
    by_inputs = ((x, factor) for x in by_features), ((by_scale, common),)
    return tuple(
        x * by if w else torch.empty_like(x)
        for (x, by), w in zip(itertools.chain(*by_inputs), call.wanted, strict=True)
    )


@_backward.register_fake
def _backward_fake(_upstream: Any, _sums: Any, *arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    return _run_fake(call, call.wanted)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    sums = () if _Call(*inputs).per_anchor else output[_N_TERMS:]
    ctx.save_for_backward(*inputs[:_N_TENSORS], *sums)
    ctx.settings = inputs[_N_TENSORS:]


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: each look unpacks them, for hooks and checkpoints to see
    call, sums = _Call(*saved[:_N_TENSORS], *ctx.settings), saved[_N_TENSORS:]
    needed = ctx.needs_input_grad[: len(Inputs._fields)]
    if any(n and not w for n, w in zip(needed, call.wanted, strict=True)):
        # Under torch.vmap and in an exported graph no tensor said so when the loss was called.
        call, sums = call._replace(wanted=list(needed)), ()
    of_terms = list(upstream[:_N_TERMS])
    if torch.is_grad_enabled():  # create_graph=True
        gradients = _differentiable_gradients(of_terms, call)
    else:
        found = torch.ops.rankloss.row_lists_backward(of_terms, list(sums), *call)
        gradients = [g if w else None for g, w in zip(found, call.wanted, strict=True)]
    return (*gradients, *(None,) * (len(call) - len(gradients)))


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _differentiable_gradients(upstream: Sequence[Tensor | None], call: _Call) -> list[Tensor | None]:
    """Gradients that carry a graph of their own."""
    # By aliases: one input may be computed of another, as gathered features are of the local ones, and what
    # flows along that path is the outer graph's to add.
    aliases = Inputs(*(None if x is None else x.view_as(x) for x in call.inputs))
    call = call._replace(**aliases._asdict())
    options = call.parsed
    batch, weights = call.unpacked()
    values, given = [], []
    with full_precision(call.image.device):
        for name, weight, g in zip(Terms._fields, weights, upstream, strict=True):
            if weight is None or g is None:
                continue
            if name == "contrastive":
                value = dense.row_lists_cross_entropy(batch)
            elif name == "cross_modal":
                value = dense.row_lists_nll(batch, "cross_modal", options, call.shuffles)
            else:
                value = dense.row_lists_nll(batch, "in_modal", options, call.shuffles)
            if not value.requires_grad:
                continue  # with a fixed reference, where nothing but that takes a gradient
            value = value * weight.to(value.dtype)
            values.append(value if call.per_anchor else value.sum())
            given.append(g)
        by = [x for x, w in zip(call.inputs, call.wanted, strict=True) if x is not None and w]
        found = (
            torch.autograd.grad(values, by, given, create_graph=True, materialize_grads=True)
            if values
            else map(torch.zeros_like, by)
        )
    gradients = iter(found)
    return [next(gradients) if w else None for w in call.wanted]


def _run(
    call: _Call, batch: Batch, weights: Terms, wanted: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """What :func:`rankloss.streaming.stream` gives, with empty gradients where none is wanted."""
    options, image = call.parsed, call.image
    plan = options.plan(call.anchors, len(image), image.device, image.dtype, has_teacher=batch.has_teacher)
    values, sums, factor = stream(batch, options, plan, weights, call.shuffles, wanted)
    return values, tuple(image.new_empty(0) if x is None else x for x in sums), factor


def _run_fake(call: _Call, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """The shapes of the gradients."""
    return tuple(
        torch.empty_like(x) if x is not None and w else call.image.new_empty(0)
        for x, w in zip(call.inputs, wanted or [False] * len(call.inputs), strict=True)
    )


def _common(upstream: Sequence[Tensor | None]) -> Tensor | None:
    """The upstream value that all terms share; None where they do not, or knowing it would cost a wait."""
    first, *others = upstream
    if first is None or any(g is None for g in others):
        return None
    for g in others:
        assert g is not None
        same = g.data_ptr() == first.data_ptr() or (first.device.type == "cpu" and torch.equal(g, first))
        if not same:
            return None
    return first
