"""Every loss class under the options that change its arithmetic, called alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankloss import ClipLoss, MimicryLoss, RankClipLoss, RankConsistency, RankedLists, SigLipLoss
from rankloss_baselines import AlipLoss, CyClipLoss

IMAGE, TEXT = TEACHER = ("reference_image_features", "reference_text_features")
Further = dict[str, Tensor]


def further(v: Tensor, t: Tensor) -> Further:
    """What some losses take beside the features of n pairs, of the same pairs."""
    return {
        IMAGE: t.detach(),
        TEXT: v.detach(),
        "caption_features": t.detach().flip(-1),
        "pair_ids": torch.arange(len(v), device=v.device) // 2,
    }


def taking(build: Callable[[], nn.Module], *names: str) -> Callable[..., Tensor]:
    """A loss of features, the scale, and the further inputs of these names."""

    def call(v: Tensor, t: Tensor, s: Tensor, inputs: Further) -> Tensor:
        value: Tensor = build()(v, t, s, **{name: inputs[name] for name in names})
        return value

    return call


def listed(in_batch_negatives: bool, **options: Any) -> Callable[..., Tensor]:
    """Lists of each image's two texts, the own one first."""

    def call(v: Tensor, t: Tensor, s: Tensor, inputs: Further) -> Tensor:
        candidates = torch.stack([t, inputs["caption_features"]], 1)
        grades = torch.tensor([2.0, 1.0], device=v.device).expand(len(v), 2)
        loss = RankedLists(in_batch_negatives=in_batch_negatives, **options)
        value: Tensor = loss(v, candidates, grades, s)
        return value

    return call


constant = functools.partial(RankClipLoss, schedule="constant")
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Further], Tensor]] = {
    "clip": taking(ClipLoss),
    "clip, smoothed": taking(functools.partial(ClipLoss, label_smoothing=0.2)),
    "siglip": taking(SigLipLoss),
    "ranks": taking(RankConsistency),
    "ranks, bins": taking(functools.partial(RankConsistency, method="bin")),
    "ranks, top one": taking(functools.partial(RankConsistency, model="top_one")),
    "ranks, top k": taking(functools.partial(RankConsistency, top_k=2, diagonal=False)),
    "ranks, all pairs": taking(functools.partial(RankConsistency, lists="batch")),
    "ranks, teacher": taking(RankConsistency, *TEACHER),
    "rank_clip": taking(constant),
    "rank_clip over siglip": taking(lambda: constant(SigLipLoss())),
    "mimicry": taking(MimicryLoss, *TEACHER),
    "lists": listed(False),
    "lists, pairwise": listed(False, model="pairwise"),
    "lists, top one": listed(False, model="top_one"),
    "lists, lambda": listed(False, model="lambda"),
    "lists, negatives": listed(True),
    "cyclip": taking(CyClipLoss),
    "alip": taking(functools.partial(AlipLoss, initial_history=0.0), "caption_features"),
}
for same_id in ("ignore", "share"):
    for make in (ClipLoss, SigLipLoss, functools.partial(ClipLoss, label_smoothing=0.2)):
        name = "siglip" if make is SigLipLoss else "clip" if make is ClipLoss else "clip, smoothed"
        LOSSES[f"{name}, {same_id}"] = taking(functools.partial(make, same_id=same_id), "pair_ids")
