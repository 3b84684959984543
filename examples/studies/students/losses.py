"""The losses of students and heads, as a user of the library builds them."""

from __future__ import annotations

from torch import Tensor, nn

import rankloss
from rankloss_trainers import catalog

TEACHER = ("reference_image_features", "reference_text_features")
CLIP, RANKCLIP, ENCODERS = "clip", "rankclip", "rankclip-encoders"
SPREAD, RANKCLIP_SPREAD = "spread", "rankclip-spread"
NAMES = (CLIP, RANKCLIP, ENCODERS, SPREAD, RANKCLIP_SPREAD)


def build(name: str, *, weight: float = 1.0, label_smoothing: float = 0.0, same_id: str = "") -> nn.Module:
    """Return the loss of a name.

    Args:
        name: Of :data:`NAMES`.
        weight: Of the added terms: it multiplies λ of RankCLIP, of the encoders' terms it is λ. These are the
            preset's terms without the spread that it brings: their records are older. Spread beside RankCLIP
            keeps its default weight.
        label_smoothing: Of CLIP's term, alone or as a base.
        same_id: What CLIP's term does with pairs of one id; empty: nothing.

    Raises:
        ValueError: For another name.
    """
    if name not in NAMES:
        raise ValueError(f"loss: must be one of {', '.join(NAMES)}, got {name!r}")
    base = rankloss.ClipLoss(same_id=same_id or None, label_smoothing=label_smoothing)
    if name == SPREAD:
        return rankloss.SpreadLoss(base, weight=weight)
    if name == ENCODERS:
        return rankloss.RankClipLoss(base, **{**catalog.LOSSES[name].defaults, "lambda_in": weight})
    if name == CLIP:
        return base
    rankclip = rankloss.RankClipLoss(base, lambda_cross=weight, lambda_in=weight)
    return rankclip if name == RANKCLIP else rankloss.SpreadLoss(rankclip)


def references(name: str, teacher: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return a teacher's features by the names of a loss's arguments; none where the loss has no teacher."""
    return dict(zip(TEACHER, teacher, strict=True)) if name == ENCODERS else {}
