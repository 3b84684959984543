"""A block of lists by ``rankloss.dense`` and autograd, for the tests of the engine and of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloss import dense
from rankloss.engine import Block
from rankloss.options import RankOptions


def terms_and_gradient_by_definition(block: Block, options: RankOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Every list's cross-entropy and C(x | y), and the gradient of their weighted sum, in float64.

    Both terms are ``[matrices, n]``, whether or not the block has a weight for them; the gradient is by the
    scores, ``[matrices, n, N]``.
    """
    n_matrices, n, _ = block.cosines.shape
    cosines = block.cosines.to("cpu", torch.float64, copy=True).requires_grad_()
    scale = block.scale.double().cpu()
    references = _references(block).cpu()
    if options.model == "top_one":  # an order is taken in the block's dtype, in which bins are computed
        references = references.double()
    own_columns = torch.arange(block.first_row, block.first_row + n)
    nll = torch.stack(
        [
            dense.list_terms(of_matrix, reference, scale, own_columns, options).sum(-1)
            for of_matrix, reference in zip(cosines, references, strict=True)
        ]
    )
    scores = scale * cosines
    cross_entropy = scores.logsumexp(-1) - scores.diagonal(block.first_row, 1, 2)

    def weights_or_zeros(weights: Tensor | None) -> Tensor:
        """A weight for each matrix, 0 where the block has no such term."""
        return torch.zeros(n_matrices, dtype=torch.float64) if weights is None else weights.double().cpu()

    alpha, beta = weights_or_zeros(block.alpha), weights_or_zeros(block.beta)
    total = alpha @ cross_entropy.sum(-1) + beta @ nll.sum(-1)
    by_scores = torch.autograd.grad(total, cosines)[0] / scale
    return cross_entropy.detach(), nll.detach(), by_scores


def _references(block: Block) -> Tensor:
    """What ranks each matrix: the other one or a teacher's, where equal items have the first one's number."""
    references = block.cosines.flip(0) if block.reference is None else block.reference
    return torch.stack(
        [
            reference if first_equal is None else reference[:, first_equal]
            for reference, first_equal in zip(references, block.first_equal, strict=True)
        ]
    )
