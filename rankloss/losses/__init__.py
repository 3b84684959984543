r"""The losses as modules. Every one takes ``(image_features, text_features, logit_scale)``, in that order.

``logit_scale`` is the multiplier s itself, as CLIP models return it, not its logarithm. Features are expected
to be unit-norm, as models return them. Nothing here normalises; the first call warns of other features.
"""

from rankloss.checks import InputWarning as InputWarning
from rankloss.losses.alip import AlipLoss as AlipLoss
from rankloss.losses.clip import ClipLoss as ClipLoss
from rankloss.losses.composition import base_entries as base_entries
from rankloss.losses.composition import combined as combined
from rankloss.losses.cyclip import CyClipLoss as CyClipLoss
from rankloss.losses.rank_clip import RankClipLoss as RankClipLoss
from rankloss.losses.rank_consistency import RankConsistency as RankConsistency
from rankloss.losses.siglip import SigLipLoss as SigLipLoss

__all__ = [
    "AlipLoss",
    "ClipLoss",
    "CyClipLoss",
    "InputWarning",
    "RankClipLoss",
    "RankConsistency",
    "SigLipLoss",
    "base_entries",
    "combined",
]
