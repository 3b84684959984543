"""A block of lists by ``rankloss.dense`` and autograd, for the tests of the engine and of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloss import dense
from rankloss.engine import Block
from rankloss.options import RankOptions


def definition(block: Block, options: RankOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Every list's cross-entropy and C(x | y), and the gradient of their weighted sum, in float64."""
    n_matrices, n, _ = block.cosines.shape
    cosines = block.cosines.to("cpu", torch.float64, copy=True).requires_grad_()
    scale = block.scale.double().cpu()
    source = block.cosines.flip(0) if block.reference is None else block.reference
    y = torch.stack([m if e is None else m[:, e] for m, e in zip(source, block.first_equal, strict=True)])
    if options.model == "top_one":  # else y has the block's dtype, in which its bins are computed
        y = y.double()
    own = torch.arange(block.first_row, block.first_row + n)
    nll = torch.stack(
        [dense.list_terms(c, m, scale, own, options).sum(-1) for c, m in zip(cosines, y.cpu(), strict=True)]
    )
    x = scale * cosines
    cross_entropy = x.logsumexp(-1) - x.diagonal(block.first_row, 1, 2)
    zero = torch.zeros(n_matrices, dtype=torch.float64)
    alpha, beta = (zero if w is None else w.double().cpu() for w in (block.alpha, block.beta))
    total = (alpha[:, None] * cross_entropy + beta[:, None] * nll).sum()
    by_scores = torch.autograd.grad(total, cosines)[0] / scale
    return cross_entropy.detach(), nll.detach(), by_scores
