"""The losses that are compared, as a user of the library builds them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, arange, nn

import rankloss

RANKED: dict[str, dict[str, object]] = {
    "rankclip": {},
    "rankclip-cross": {"lambda_in": 0.0},
    "rankclip-in": {"lambda_cross": 0.0},
    "rankclip-constant": {"schedule": "constant"},
}
NAMES = ("clip", *RANKED)


def build(name: str, *, label_smoothing: float = 0.0) -> nn.Module:
    """Return the loss of a name; label smoothing is that of CLIP's term, alone or as a base.

    Raises:
        ValueError: For another name.
    """
    if name not in NAMES:
        raise ValueError(f"loss: must be one of {', '.join(NAMES)}, got {name!r}")
    base = SmoothedClipLoss(label_smoothing) if label_smoothing else None
    if name == "clip":
        return base or rankloss.ClipLoss()
    return rankloss.RankClipLoss(base, **RANKED[name])


class SmoothedClipLoss(nn.Module):
    """CLIP's loss with label smoothing ε: the targets have 1 − ε + ε/N at the pair and ε/N elsewhere."""

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of unit-norm features, ``[N, D]`` each."""
        logits = logit_scale * image_features @ text_features.T
        pairs, ways = arange(len(logits)), (logits, logits.T)
        loss = sum(F.cross_entropy(x, pairs, label_smoothing=self.label_smoothing) for x in ways) / 2
        return {"contrastive_loss": loss} if output_dict else loss
