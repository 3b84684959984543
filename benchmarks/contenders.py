"""The losses that are compared, and the batches they are compared on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenClipSigLipLoss
from torch import Tensor

from naive import naive_rank_terms
from rankloss import ClipLoss, RankClipLoss, RankConsistency, SigLipLoss

__all__ = ["BIAS", "LOSSES", "SCALE", "D", "Loss", "batch"]

Loss = Callable[..., Tensor]

D, SCALE, BIAS = 512, 1 / 0.07, -10.0

STREAMED: Any = {"memory_budget": 0}

# ClipLoss and SigLipLoss are open_clip's; streamed, they are ours as beyond their budget.
# RankClipLoss around its own base takes CLIP's loss from the same pass over the rows as the rank terms.
LOSSES: dict[str, Callable[[], Loss]] = {
    "ClipLoss": OpenClipLoss,
    "ClipLoss streamed": lambda: ClipLoss(**STREAMED),
    "SigLipLoss": lambda: partial(OpenClipSigLipLoss(), logit_bias=BIAS),
    "SigLipLoss streamed": lambda: partial(SigLipLoss(**STREAMED), logit_bias=BIAS),
    "naive terms": lambda: naive_rank_terms,
    "RankConsistency sort": RankConsistency,
    "RankConsistency bin": lambda: RankConsistency(method="bin"),
    "RankClipLoss sort": lambda: RankClipLoss(schedule="constant"),
    "RankClipLoss bin": lambda: RankClipLoss(schedule="constant", method="bin"),
    "RankClipLoss sort, rows": lambda: RankClipLoss(schedule="constant", **STREAMED),
    "RankClipLoss bin, rows": lambda: RankClipLoss(schedule="constant", method="bin", **STREAMED),
}


def batch(n: int, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text features of unit norm, independent of each other, and CLIP's initial scale."""
    generator = torch.Generator().manual_seed(0)
    v, t = (F.normalize(torch.randn(n, d, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return v, t, torch.tensor(SCALE, requires_grad=True)
