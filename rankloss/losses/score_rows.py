r"""A loss of rows of scores, in memory linear in the batch.

A matrix has the scores X = s·C + b, with the cosines C = Q·Kᵀ of n anchors and N items. For a function ℓ of
a row the loss is its mean over the rows, and over the matrices, if there are two:

    L = (1/m)·Σ_k (1/n)·Σ_i ℓ(x_i),   G = ∂Σ_i ℓ(x_i) / ∂X,   ∂b = (1/mn)·Σ G,

with the gradients by Q, K and s of :mod:`rankloss.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rankloss import engine
from rankloss.batch import Inputs, Matrix
from rankloss.precision import nan_unless_finite, sum_dtype

_NAMES = (*Inputs._fields, "bias")
_FACTORS = (("image", "text"), ("text", "image"))
_LOCAL_FACTORS = (("image_anchors", "text"), ("text_anchors", "image"))


class RowLoss(Protocol):
    """A function ℓ of rows of scores; row i has its own pair in column ``first_row + i``."""

    def values(self, scores: Tensor, first_row: int) -> Tensor:
        """ℓ of rows ``[n, N]``: ``[n]``, differentiable any number of times."""

    def evaluate(self, scores: Tensor, first_row: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """ℓ of rows ``[matrices, n, N]``, and if wanted its gradient, which overwrites the scores."""


class Differentiated(NamedTuple):
    """ℓ as a function of rows of scores ``[n, N]`` and the column of the first row's own pair.

    Its gradient is autograd's.
    """

    function: Callable[[Tensor, int], Tensor]

    def values(self, scores: Tensor, first_row: int) -> Tensor:
        """ℓ of every row.

        Raises:
            ValueError: unless it is one value per row.
        """
        values = self.function(scores, first_row)
        if not isinstance(values, Tensor) or values.shape != scores.shape[:-1]:
            shape = tuple(values.shape) if isinstance(values, Tensor) else values
            raise ValueError(f"row_loss must give one value for each of {len(scores)} rows; got {shape!r}")
        return values

    def evaluate(self, scores: Tensor, first_row: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """ℓ of every row, and its gradient, which overwrites the scores; None unless it is wanted.

        Raises:
            ValueError: if ℓ depends on another tensor that requires a gradient, which would get none.
        """
        if not with_gradient:
            return torch.stack([self.values(rows, first_row) for rows in scores]), None
        # Hooks of the forward pass, such as a checkpoint's, are not for this graph, which ends here.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            leaf = scores.clone().requires_grad_()
            values = torch.stack([self.values(rows, first_row) for rows in leaf])
            if any(other is not leaf for other in _leaves(values)):
                raise ValueError(
                    "row_loss must depend on the scores alone: another tensor that requires a gradient "
                    "would get none"
                )
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), scores.copy_(gradient)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a value's graph gives gradients to."""
    leaves = []
    nodes_to_visit = [value.grad_fn]
    known_nodes = {None, value.grad_fn}  # None stands for a constant
    while nodes_to_visit:
        node = nodes_to_visit.pop()
        leaf = getattr(node, "variable", None)  # of the node that ends at a leaf, an AccumulateGrad
        if leaf is not None:
            leaves.append(leaf)
        nodes_below = {function for function, _ in getattr(node, "next_functions", ())}
        nodes_to_visit += nodes_below - known_nodes
        known_nodes |= nodes_below
    return leaves


def mean_of_rows(
    row_loss: RowLoss,
    inputs: Mapping[str, Tensor | None],
    first_row: int,
    chunk_size: int | None = None,
    factors: Sequence[tuple[str, str]] | None = None,
) -> Tensor:
    """The mean of ℓ over the rows of the matrices, in chunks of rows.

    Args:
        row_loss: ℓ.
        inputs: by the names of :class:`rankloss.batch.Inputs`, and ``bias``: b, or None for 0.
        first_row: the column of the first row's own pair.
        chunk_size: rows computed at a time; None chooses from the sizes and the device.
        factors: the names of each matrix's anchors and items. None: S and R, whose anchors are this process's
            own features, if ``inputs`` have them, else all.
    """
    image = inputs["image"]
    assert image is not None
    if factors is None:
        factors = _FACTORS if inputs["image_anchors"] is None else _LOCAL_FACTORS
    terms = ScoreRows(row_loss, factors, first_row, chunk_size)
    weights = image.new_ones(1, dtype=sum_dtype(image))
    (loss,) = engine.apply(terms, weights, [inputs.get(name) for name in _NAMES])
    return loss


class ScoreRows(NamedTuple):
    """The mean of ℓ, as streamed terms."""

    row_loss: RowLoss
    factors: Sequence[tuple[str, str]]
    first_row: int
    chunk_size: int | None
    wanted: Sequence[bool] = (True,)

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> engine.Streamed:
        """L times its weight, and the gradient by each of the inputs; see :class:`engine.Streamed`."""
        by_name = dict(zip(_NAMES, inputs, strict=True))
        scale, bias = by_name["scale"], by_name["bias"]

        def evaluate_rows(cosines: Tensor, _: Tensor | None, first_row: int) -> Sequence[Tensor | None]:
            """The loop's two values are ℓ of every row and the sum of its gradient, which is that by b."""
            scores = cosines.mul_(scale) if bias is None else torch.addcmul(bias, scale, cosines, out=cosines)
            losses, gradient = self.row_loss.evaluate(scores, first_row, with_gradient)
            by_bias = None
            if bias is not None and gradient is not None:
                by_bias = gradient.sum(-1, dtype=weights.dtype)
            return losses, by_bias, gradient

        matrices = self._matrices(by_name)
        loop = engine.Loop(evaluate_rows, matrices, self.first_row, chunk_size=self.chunk_size)
        share = self._share(by_name, weights)
        values_by_loop, gradients, factor = engine.streamed([loop], by_name, with_gradient, share)
        losses, by_bias = values_by_loop[0]
        if by_bias is not None:
            gradients["bias"] = (share * by_bias.sum()).to(bias.dtype)
        by_inputs = [gradients.get(name) for name in _NAMES]
        return engine.Streamed(values=[share * losses.sum()], gradients=by_inputs, factor=factor)

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """L times its weight from whole matrices, in operations that can be differentiated twice."""
        by_name = dict(zip(_NAMES, inputs, strict=True))
        scale, bias = by_name["scale"], by_name["bias"]
        losses = []
        for matrix in self._matrices(by_name):
            scores = scale * matrix.cosines()
            scores = scores if bias is None else scores + bias
            losses.append(self.row_loss.values(scores, self.first_row).sum())
        total = torch.stack(losses).sum()
        return [self._share(by_name, weights).to(total.dtype) * total]

    def _matrices(self, inputs: Mapping[str, Any]) -> list[Matrix]:
        """The matrices of cosines of the anchors and items that ``factors`` names."""
        return [Matrix(inputs[anchors], inputs[items], (anchors, items)) for anchors, items in self.factors]

    def _share(self, inputs: Mapping[str, Any], weights: Tensor) -> Tensor:
        """The factor of every ℓ(x_i), L's weight by the number of rows; NaN unless features are finite."""
        rows = sum(len(inputs[anchors]) for anchors, _ in self.factors)
        return nan_unless_finite(weights[0] / rows, inputs["image"], inputs["text"])
