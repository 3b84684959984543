r"""SigLIP's loss over all pairs, streamed, as an operator of torch's with its autograd.

With logits x_ij = s·v_i·t_j + b, and y_ij = −x_ij where j is image i's own text, else x_ij,

    L = (1/n)·Σ_ij log(1 + e^{y_ij}),
    G_ij = n·∂L/∂x_ij = −σ(y_ij) where j is image i's own text, else σ(y_ij),
    ∂V = (s/n)·G·T,   ∂T = (s/n)·Gᵀ·V,   ∂s = (1/n)·Σ (G·T)∘V,   ∂b = (1/n)·Σ G.

The pass walks over chunks of images. It adds up value and gradient of each chunk and drops the chunk's
matrices; what is kept for the backward pass are the features and their gradients, in O(N·D). A backward pass
that is itself to be differentiated (``create_graph=True``) goes through :func:`plain` and takes quadratic
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import Matrix, scalar
from rankloss.operators import register
from rankloss.options import RankOptions
from rankloss.plans import make_plan
from rankloss.precision import arithmetic_dtype, full_precision, nan_unless_finite
from rankloss.ranking import slices

_LINEAR_FROM = 40.0  # from where log(1 + e^y) is y in float64


def pair_sigmoid(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    first_row: int,
    chunk_size: int | None = None,
) -> Tensor:
    """L of ``[n, D]`` images and ``[N, D]`` texts, in float32, or in float64 if either is that.

    Args:
        images: the rows.
        texts: the columns.
        logit_scale: s, one number.
        logit_bias: b, one number.
        first_row: the column of the first image's own text; those of the others follow it.
        chunk_size: images multiplied out at a time; None chooses from the sizes and the device.
    """
    dtype, home = arithmetic_dtype(images, texts), images.device
    device = torch.device("cpu") if home.type == "mps" else home  # MPS has no float64
    features = (x.to(device).to(dtype) for x in (images, texts))
    numbers = (scalar(x, home).to(device, non_blocking=True).to(dtype) for x in (logit_scale, logit_bias))
    inputs = (*features, *numbers)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    value: Tensor = _PairSigmoid.apply(*inputs, first_row, wanted, chunk_size)  # type: ignore[no-untyped-call]
    return value.to(home)


def plain(inputs: Sequence[Tensor], first_row: int) -> Tensor:
    """L of n images, N texts, s and b from the whole matrix, differentiable any number of times."""
    images, texts, scale, bias = inputs
    x = scale * Matrix("S", images, texts, ("image", "text")).cosines() + bias
    own = first_row + torch.arange(len(images), device=images.device)
    y = torch.where(own[:, None] == torch.arange(len(texts), device=images.device), -x, x)
    return -F.logsigmoid(-y).sum() / len(images)


def stream(
    inputs: Sequence[Tensor], first_row: int, wanted: Sequence[bool], chunk_size: int
) -> tuple[Tensor, list[Tensor]]:
    """L, and its gradient by each of the inputs, of which those that are not wanted may be zero."""
    images, texts, scale, bias = inputs
    by_images, by_texts = torch.zeros_like(images), torch.zeros_like(texts)
    # In float64: these are sums over all chunks.
    value, by_bias = (images.new_zeros((), dtype=torch.float64) for _ in range(2))
    with full_precision(images.device):
        for rows in slices(len(images), chunk_size):
            anchors, own = images[rows], first_row + rows.start
            y = torch.addmm(bias, scale * anchors, texts.T)
            y.diagonal(own).neg_()
            value += F.softplus(y, threshold=_LINEAR_FROM).sum(dtype=torch.float64)
            if not any(wanted):
                continue
            gradient = y.sigmoid_()
            gradient.diagonal(own).neg_()
            by_images[rows] = gradient @ texts
            by_bias += gradient.sum(dtype=torch.float64)
            if wanted[1]:  # a product more, which a frozen tower spares
                by_texts.addmm_(gradient.T, anchors)
    share = nan_unless_finite(value.new_full((), 1 / len(images)), images, texts)
    by_scale = (by_images * images).sum(dtype=torch.float64)
    for sums in (by_images, by_texts):
        sums *= share * scale
    value, by_scale, by_bias = ((share * x).to(images.dtype) for x in (value, by_scale, by_bias))
    return value, [by_images, by_texts, by_scale, by_bias]


def _run(*arguments: Any) -> list[Tensor]:
    """L, then its gradients by the inputs."""
    *inputs, first_row, wanted, chunk_size = arguments
    images, texts = inputs[:2]
    plan = make_plan(RankOptions(chunk_size=chunk_size), len(images), len(texts), images.device, images.dtype)
    value, gradients = stream(inputs, first_row, wanted, plan.chunk_size)
    return [value, *gradients]


def _run_fake(*arguments: Any) -> list[Tensor]:
    inputs = arguments[:4]
    return [inputs[0].new_empty(()), *map(torch.empty_like, inputs)]


register(
    "pair_sigmoid",
    "(Tensor images, Tensor texts, Tensor scale, Tensor bias, int first_row, bool[] wanted, int? chunk_size) "
    "-> Tensor[]",
    _run,
    _run_fake,
)


class _PairSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        value, *gradients = torch.ops.rankloss.pair_sigmoid(*arguments)
        ctx.save_for_backward(*arguments[:4], *gradients)
        ctx.first_row = arguments[4]
        result: Tensor = value
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: each look unpacks them, for hooks and checkpoints to see
        if torch.is_grad_enabled():  # create_graph=True
            # By aliases: one input may be computed of another, and that path is the outer graph's to add.
            inputs = [x.view_as(x) for x in saved[:4]]
            wanted = ctx.needs_input_grad[:4]
            by = [x for x, w in zip(inputs, wanted, strict=True) if w]
            with full_precision(upstream[0].device):
                value = plain(inputs, ctx.first_row)
                found = iter(torch.autograd.grad(value, by, upstream, create_graph=True))
            return *(next(found) if w else None for w in wanted), None, None, None
        return *(upstream[0] * x for x in saved[4:]), None, None, None
