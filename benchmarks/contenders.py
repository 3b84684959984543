"""The losses that are compared, and the batches they are compared on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenClipSigLipLoss
from torch import Tensor

from naive import naive_rank_terms
from rankloss import ClipLoss, Gather, RankClipLoss, RankConsistency, SigLipLoss
from rankloss_trainers import catalog

Loss = Callable[..., Tensor]

D, SCALE, BIAS = 512, 1 / 0.07, -10.0
DISTILLED = "rankclip-distill"


@cache
def teacher(n: int, d: int) -> dict[str, Tensor]:
    """A teacher's features of n pairs."""
    v, t, _ = batch(n, d, seed=1)
    return {"reference_image_features": v.detach(), "reference_text_features": t.detach()}


def distilled() -> Loss:
    """``--loss rankclip-distill`` at λ = 64/16."""
    gather = Gather(rank=0, world_size=1)
    chosen = catalog.choose(DISTILLED, {"schedule": "constant"})
    loss = chosen.build(ClipLoss(gather=gather), gather)
    return lambda v, t, s: loss(v, t, s, **teacher(*v.shape))


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
    DISTILLED: distilled,
    "RankClipLoss": lambda: RankClipLoss(schedule="constant"),
    "RankClipLoss bin": lambda: RankClipLoss(schedule="constant", method="bin"),
}


def batch(n: int, d: int = D, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text features of unit norm, independent of each other, and CLIP's initial scale."""
    generator = torch.Generator().manual_seed(seed)
    v, t = (F.normalize(torch.randn(n, d, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return v, t, torch.tensor(SCALE, requires_grad=True)
