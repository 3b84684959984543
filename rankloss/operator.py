"""Row lists as an operator of torch's: the streaming pass with its autograd, opaque to a compiler.

What is kept for the backward pass are the features and the gradient of the terms' weighted sum, in O(N·D).
The backward pass multiplies it by the upstream value, which as a rule is one for all terms, since a loss is
the sum of its terms; where they have different ones, the pass is run once more. A backward pass that is
itself to be differentiated (``create_graph=True``) goes through :mod:`rankloss.dense`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss import dense
from rankloss.batch import Batch, Inputs, constant
from rankloss.operators import register
from rankloss.options import RankOptions
from rankloss.plans import make_plan
from rankloss.precision import full_precision, may_look_at
from rankloss.streaming import stream


def weighted_terms(
    batch: Batch, options: RankOptions, weights: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight.

    An anchor's rank term is the mean of its lists' NLL over the two directions. ``reduction="mean"`` divides
    each list by its Σ_p μ_p and averages the anchors; ``"sum"`` is N times the average of the anchors' sums,
    which is the plain sum where every item is an anchor, and keeps the balance between terms where a process
    holds a share of the anchors only. The cross-entropy is always the mean over the anchors.

    Args:
        batch: the features.
        options: of the rank terms.
        weights: ``[3]``, on the CPU or the features' device. A compiled graph follows them, since they are a
            tensor; they take no gradient.
        wanted: which of the terms are; the others are zero. Only row lists of worth ``exp`` can carry the
            cross-entropy.

    Returns:
        Three scalars in the batch's dtype, on the device of the features as they were given.
    """
    image = batch.image
    if weights.device.type == "meta" and image.device.type != "meta":
        raise ValueError(f"weights must be on {image.device}, as the features; got meta")
    weights = constant(weights).to(image.device, non_blocking=True).double()
    terms: Sequence[Tensor]
    if options.is_dense:
        if options.kernel == "triton":  # the plan says why it does not serve
            make_plan(options, batch.anchors, len(image), image.device, image.dtype)
        dense.check_memory(batch, options)
        terms = dense.terms(batch, options, batch.nan_unless_finite(weights), wanted)
    else:
        tensors = (*batch.inputs, weights, batch.reference_image, batch.reference_text)
        by = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in batch.inputs]
        terms = _RowLists.apply(*tensors, batch.first_row, list(wanted), by, options.encoded)  # type: ignore[no-untyped-call]
    return tuple(terms if batch.home is None else (x.to(batch.home) for x in terms))


_N_TERMS, _N_TENSORS = 3, len(Inputs._fields) + 3
_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor? image_anchors, Tensor? text_anchors, Tensor scale, Tensor weights, "
    "Tensor? reference_image, Tensor? reference_text, int first_row, bool[] terms, bool[] by, str options"
)


class _Call(NamedTuple):
    """The arguments of the operator."""

    image: Tensor
    text: Tensor
    image_anchors: Tensor | None
    text_anchors: Tensor | None
    scale: Tensor
    weights: Tensor
    reference_image: Tensor | None
    reference_text: Tensor | None
    first_row: int
    terms: Sequence[bool]
    by: Sequence[bool]
    options: str

    @property
    def batch(self) -> Batch:
        features = self.image, self.text, self.scale, self.image_anchors, self.text_anchors
        return Batch(*features, self.first_row, self.reference_image, self.reference_text)

    def of(self, inputs: Iterable[Tensor | None]) -> _Call:
        """The same of other inputs."""
        image, text, image_anchors, text_anchors, scale = inputs
        assert image is not None
        assert text is not None
        assert scale is not None
        return _Call(image, text, image_anchors, text_anchors, scale, *self[len(Inputs._fields) :])  # type: ignore[arg-type]


def _run(*arguments: Any) -> list[Tensor]:
    """The three terms, then the gradients of their sum by those inputs that take one.

    Those by features lack the factor s, which the backward pass multiplies them by anyway.
    """
    call = _Call(*arguments)
    batch, options, image = call.batch, RankOptions.decode(call.options), call.image
    plan = make_plan(options, batch.anchors, len(image), image.device, image.dtype)
    values, gradients = stream(batch, options, plan, call.weights, call.terms, call.by)
    # Copies, since no operator may return what was made in inference mode.
    terms = (value.to(image.dtype, copy=True) for value in values)
    return [*terms, *gradients]


def _run_fake(*arguments: Any) -> list[Tensor]:
    call = _Call(*arguments)
    return [*(call.image.new_empty(()) for _ in range(_N_TERMS)), *_gradients_fake(call)]


def _backward(
    upstream: Sequence[Tensor | None], gradients: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:
    """The gradients under an upstream value per term, given those of the sum."""
    call = _Call(*arguments)
    factor = _common([g for g, is_wanted in zip(upstream, call.terms, strict=True) if is_wanted])
    if factor is None:
        zero = call.weights.new_zeros(())
        by_term = torch.stack([zero if g is None else g.to(zero.dtype) for g in upstream])
        _, _, _, *gradients = _run(*call._replace(weights=call.weights * by_term))
        factor = torch.ones_like(call.scale)
    of_features = factor * call.scale
    wanted = (name for name, is_wanted in zip(Inputs._fields, call.by, strict=True) if is_wanted)
    return [
        x * (factor if name == "scale" else of_features) for name, x in zip(wanted, gradients, strict=True)
    ]


def _backward_fake(_upstream: Any, _gradients: Any, *arguments: Any) -> list[Tensor]:
    return _gradients_fake(_Call(*arguments))


def _gradients_fake(call: _Call) -> list[Tensor]:
    inputs = zip(call.batch.inputs, call.by, strict=True)
    return [torch.empty_like(x) for x, is_wanted in inputs if x is not None and is_wanted]


def _common(upstream: Sequence[Tensor | None]) -> Tensor | None:
    """The upstream value that all terms share; None where they do not, or knowing it would cost a wait."""
    first, *others = upstream
    for g in others:
        if first is None or g is None:
            return None
        if g.data_ptr() != first.data_ptr() and not (may_look_at(g) and torch.equal(g, first)):
            return None
    return first


register("row_lists", f"({_ARGUMENTS}) -> Tensor[]", _run, _run_fake)
register(
    "row_lists_backward",
    f"(Tensor?[] upstream, Tensor[] gradients, {_ARGUMENTS}) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _RowLists(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        call = _Call(*arguments)
        run = torch.ops.rankloss.row_lists if torch.compiler.is_compiling() else _run
        found = run(*arguments)
        terms, gradients = found[:_N_TERMS], found[_N_TERMS:]
        ctx.is_dense = may_look_at(call.image) and _scores_are_too_large(call, terms)
        if ctx.is_dense:
            terms = _terms_by_definition(call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:_N_TENSORS], *gradients)
        ctx.settings = arguments[_N_TENSORS:]
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: each look unpacks them, for hooks and checkpoints to see
        call = _Call(*saved[:_N_TENSORS], *ctx.settings)
        if ctx.is_dense or torch.is_grad_enabled():  # the latter with create_graph=True
            found = _gradients_by_definition(upstream, call)
        else:
            run = torch.ops.rankloss.row_lists_backward if torch.compiler.is_compiling() else _backward
            found = run(list(upstream), list(saved[_N_TENSORS:]), *call)
        remaining = iter(found)
        gradients = [next(remaining) if is_wanted else None for is_wanted in call.by]
        return (*gradients, *(None,) * (len(call) - len(gradients)))


# --- by definition ----------------------------------------------------------------------------------------


def _scores_are_too_large(call: _Call, terms: Sequence[Tensor]) -> bool:
    """Whether terms are NaN though all features are finite: scores too large for float64 sums."""
    if not any(math.isnan(x) for x in terms):
        return False
    return bool(call.batch.nan_unless_finite(call.weights).isfinite().all())


def _terms_by_definition(call: _Call) -> list[Tensor]:
    batch = call.batch
    weights = batch.nan_unless_finite(call.weights)
    return dense.terms(batch, RankOptions.decode(call.options), weights, call.terms)


def _gradients_by_definition(upstream: Sequence[Tensor | None], call: _Call) -> Sequence[Tensor]:
    """With a graph of their own where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    # By aliases: one input may be computed of another, as gathered features are of the local ones, and what
    # flows along that path is the outer graph's to add.
    with torch.enable_grad(), full_precision(call.image.device):
        call = call.of(None if x is None else x.view_as(x) for x in call.batch.inputs)
        terms = _terms_by_definition(call)
        given = [(x, g) for x, g in zip(terms, upstream, strict=True) if x.requires_grad and g is not None]
        by = [x for x, w in zip(call.batch.inputs, call.by, strict=True) if x is not None and w]
        if not given:
            return [torch.zeros_like(x) for x in by]
        outputs, grads = zip(*given, strict=True)
        return torch.autograd.grad(outputs, by, grads, create_graph=create_graph, materialize_grads=True)
