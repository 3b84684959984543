r"""SigLIP's loss of all pairs, as a streamed loss: the values and gradient of a block of rows.

With logits x_ij = s·v_i·t_j + b, and y_ij = −x_ij where j is image i's own text, else x_ij,

    L = (1/n)·Σ_ij log(1 + e^{y_ij}),
    G_ij = n·∂L/∂x_ij = −σ(y_ij) where j is image i's own text, else σ(y_ij),   ∂b = (1/n)·Σ G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import engine
from rankloss.batch import Matrix
from rankloss.precision import arithmetic_device, arithmetic_dtype, nan_unless_finite, scalar

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
    device = arithmetic_device(home)
    given = (images, texts, scalar(logit_scale, home), scalar(logit_bias, home))
    inputs = [x.resolve_neg().to(device, non_blocking=x.dim() == 0).to(dtype) for x in given]
    weights = torch.ones(1, dtype=torch.float64, device=device)
    (value,) = engine.apply(PairSigmoid(first_row, chunk_size), weights, inputs)
    return value.to(home)


class PairSigmoid(NamedTuple):
    """L of images, texts, s and b."""

    first_row: int
    chunk_size: int | None
    wanted: Sequence[bool] = (True,)

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> engine.Streamed:
        """L times its weight, and the gradient by each of the inputs."""
        images, texts, scale, bias = inputs
        sums: dict[str, Tensor] | None = {} if with_gradient else None

        def of_rows(cosines: Tensor, _: Tensor | None, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
            y = torch.addcmul(bias, scale, cosines, out=cosines)
            y.diagonal(first_row, 1, 2).neg_()
            value = F.softplus(y, threshold=_LINEAR_FROM).sum(-1, dtype=torch.float64)
            gradient = y.sigmoid_()
            gradient.diagonal(first_row, 1, 2).neg_()
            return value, gradient.sum(-1, dtype=torch.float64), gradient

        matrix = Matrix(images, texts, ("image", "text"))
        value, by_bias = engine.accumulate(of_rows, [matrix], (), sums, self.first_row, self.chunk_size)
        share = nan_unless_finite(weights / len(images), images, texts)
        values = [(share * value).squeeze()]
        if sums is None:
            return values, [None] * len(inputs)
        by_scale = share * (sums["image"] * images).sum()
        by_features = [sums[name].mul_((share * scale).to(images.dtype)) for name in ("image", "text")]
        by_numbers = [x.to(scale.dtype).squeeze() for x in (by_scale, share * by_bias)]
        return values, [*by_features, *by_numbers]

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """The same from the whole matrix."""
        images, texts, scale, bias = inputs
        x = scale * Matrix(images, texts, ("image", "text")).cosines() + bias
        own = self.first_row + torch.arange(len(images), device=images.device)
        y = torch.where(own[:, None] == torch.arange(len(texts), device=images.device), -x, x)
        return [weights.squeeze().to(x.dtype) * -F.logsigmoid(-y).sum() / len(images)]
