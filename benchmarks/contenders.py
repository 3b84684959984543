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
from rankloss import ClipLoss, Gather, RankClipLoss, RankConsistency, SigLipLoss
from rankloss_trainers import catalog

Loss = Callable[..., Tensor]

D, SCALE, BIAS = 512, 1 / 0.07, -10.0


class Distilled:
    """``--loss rankclip-distill`` at λ = 64/16, with a teacher's features of any number of pairs at hand."""

    def __init__(self) -> None:
        preset = catalog.candidates()["rankclip-distill"].load()
        options = {option.key: option.default for option in preset.options}
        gather = Gather(rank=0, world_size=1)
        self.loss = preset.build(ClipLoss(gather=gather), {**options, "schedule": "constant"}, gather)
        self._teacher: dict[str, Tensor] = {}

    def prepare(self, n: int, d: int) -> None:
        """Make the teacher's features of n pairs, ahead of what is measured."""
        v, t, _ = batch(n, d, seed=1)
        names = ("reference_image_features", "reference_text_features")
        self._teacher = {name: x.detach() for name, x in zip(names, (v, t), strict=True)}

    def __call__(self, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if next((len(x) for x in self._teacher.values()), None) != len(v):
            self.prepare(*v.shape)
        value: Tensor = self.loss(v, t, s, **self._teacher)
        return value


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
    "rankclip-distill": Distilled,
    "RankClipLoss": lambda: RankClipLoss(schedule="constant"),
    "RankClipLoss bin": lambda: RankClipLoss(schedule="constant", method="bin"),
}


def batch(n: int, d: int = D, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text features of unit norm, independent of each other, and CLIP's initial scale."""
    generator = torch.Generator().manual_seed(seed)
    v, t = (F.normalize(torch.randn(n, d, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return v, t, torch.tensor(SCALE, requires_grad=True)
