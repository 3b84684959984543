"""The arms' losses: CLIP's, and three ways to use a hard negative of each caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankloss_trainers import create

CLIP, NEGCLIP, LISTS, PREFERENCES = "clip", "negclip", "lists", "preferences"
_OPTIONS = {LISTS: {"in_batch_negatives": True, "top_k": 1}, PREFERENCES: {"model": "pairwise"}}


class HardNegatives(nn.Module):
    """The loss of pictures, their captions, and a hard negative of each caption.

    ``negclip`` is CLIP's loss whose pictures have all hard negatives of the batch as further texts. ``lists``
    and ``preferences`` are CLIP's loss plus that of lists of two, the caption before its negative: with the
    batch's other texts below them, or alone, by Bradley and Terry's model.

    Args:
        name: "clip", "negclip", "lists" or "preferences".
        weight: Of the lists.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__()
        self.has_negatives = name == NEGCLIP
        self.lists = create("ranked-lists", weight=weight, **_OPTIONS[name]) if name in _OPTIONS else None

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False,
        *, negatives: Tensor, has_negative: Tensor,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Return the loss of unit-norm features, ``[N, D]``; some pairs have no negative."""
        v, t = image_features, text_features
        if self.lists is None:
            texts = torch.cat([t, negatives[has_negative]]) if self.has_negatives else t
            ways, own = (v @ texts.T, t @ v.T), torch.arange(len(v))
            loss = sum(cross_entropy(logit_scale * way, own) for way in ways) / 2
            return {"contrastive_loss": loss} if output_dict else loss
        lists = {
            "query_features": v,
            "candidate_features": torch.stack([t, negatives], 1),
            "grades": torch.tensor([1, 0]).expand(len(v), 2),
            "mask": torch.stack([torch.ones_like(has_negative), has_negative], 1),
        }
        pairs = {"image_features": v, "text_features": t}
        return self.lists(logit_scale=logit_scale, output_dict=output_dict, **pairs, **lists)
