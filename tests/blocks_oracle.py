"""A block of lists by ``rankloss.dense`` and autograd, for the tests of the engine and of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloss import dense
from rankloss.engine import Block
from rankloss.options import RankOptions


def definition(block: Block, options: RankOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Every list's cross-entropy and C(x | y), and the gradient of their weighted sum, in float64."""
    n_matrices, n, n_items = block.cosines.shape
    x = (block.scale.double() * block.cosines.double()).cpu().requires_grad_()
    source = block.cosines.flip(0) if block.reference is None else block.reference
    y = torch.stack([m if e is None else m[:, e] for m, e in zip(source, block.first_equal, strict=True)])
    kept = torch.ones(n, n_items, dtype=torch.bool)
    if not options.diagonal:
        kept.diagonal(block.first_row).fill_(False)
    lists, y = (a[:, kept].view(n_matrices, n, -1) for a in (x, y.cpu()))
    if options.model == "top_one":
        factor = float(block.scale) if options.reference_scale is None else options.reference_scale
        p = (factor * y.double()).softmax(-1)
        nll = (p * (lists.logsumexp(-1, keepdim=True) - lists)).sum(-1)
    else:
        nll = dense.nll_terms(lists, y, options).sum(-1)
    cross_entropy = x.logsumexp(-1) - x.diagonal(block.first_row, 1, 2)
    zero = torch.zeros(n_matrices, dtype=torch.float64)
    alpha, beta = (zero if w is None else w.double().cpu() for w in (block.alpha, block.beta))
    total = (alpha[:, None] * cross_entropy + beta[:, None] * nll).sum()
    return cross_entropy.detach(), nll.detach(), torch.autograd.grad(total, x)[0]
