"""The losses of students and heads, as a user of the library builds them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, arange, nn

import rankloss
from rankloss_trainers import create

TEACHER = ("reference_image_features", "reference_text_features")
CLIP, RANKCLIP, ENCODERS = "clip", "rankclip", "rankclip-encoders"
NAMES = (CLIP, RANKCLIP, ENCODERS)


def build(name: str, *, weight: float = 1.0, label_smoothing: float = 0.0, same_id: str = "") -> nn.Module:
    """Return the loss of a name.

    Args:
        name: Of :data:`NAMES`.
        weight: Multiplies λ of RankCLIP; of the encoders' terms it is λ.
        label_smoothing: Of CLIP's term, alone or as a base.
        same_id: What CLIP's term does with pairs of one id; empty: nothing.

    Raises:
        ValueError: For another name.
    """
    if name not in NAMES:
        raise ValueError(f"loss: must be one of {', '.join(NAMES)}, got {name!r}")
    base = (
        SmoothedClipLoss(label_smoothing) if label_smoothing else rankloss.ClipLoss(same_id=same_id or None)
    )
    if name == RANKCLIP:
        return rankloss.RankClipLoss(base, lambda_cross=weight, lambda_in=weight)
    return create(name, base, lambda_in=weight) if name == ENCODERS else base


def references(name: str, teacher: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return a teacher's features by the names of a loss's arguments; none where the loss has no teacher."""
    return dict(zip(TEACHER, teacher, strict=True)) if name == ENCODERS else {}


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
