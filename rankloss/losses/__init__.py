r"""The losses as modules. Each takes ``(image_features, text_features, logit_scale)``, in this order.

``logit_scale`` is the multiplier s itself, as CLIP models return it, not its logarithm. Features are expected
to be unit-norm, as models return them. No loss normalises features; the first call warns of others.

Losses of other packages write their terms as subclasses of :class:`AddedTerms`, on a base, or of
:class:`OwnTerms`, on none. A ``forward`` of one's own has :class:`GatheringLoss`, which gathers, checks the
inputs and streams a loss of rows, and :func:`check_base`, :func:`takes_teacher`, :func:`base_entries` and
:func:`combined` for a base. :func:`check_weight`, :func:`check_count` and :func:`check_choice` are for
options, :func:`outside_graphs`, :func:`product` and :func:`widest_dtype` for the arithmetic.
"""

from rankloss.checks import InputWarning as InputWarning
from rankloss.losses.clip import ClipLoss as ClipLoss
from rankloss.losses.composition import TEACHER as TEACHER
from rankloss.losses.composition import Base as Base
from rankloss.losses.composition import base_entries as base_entries
from rankloss.losses.composition import check_base as check_base
from rankloss.losses.composition import combined as combined
from rankloss.losses.composition import takes_teacher as takes_teacher
from rankloss.losses.gathering import GatheringLoss as GatheringLoss
from rankloss.losses.mimicry import MimicryLoss as MimicryLoss
from rankloss.losses.own_terms import AddedTerms as AddedTerms
from rankloss.losses.own_terms import OwnTerms as OwnTerms
from rankloss.losses.rank_clip import RankClipLoss as RankClipLoss
from rankloss.losses.rank_consistency import RankConsistency as RankConsistency
from rankloss.losses.ranked_lists import RankedLists as RankedLists
from rankloss.losses.siglip import SigLipLoss as SigLipLoss
from rankloss.losses.spread import SpreadLoss as SpreadLoss
from rankloss.options import check_choice as check_choice
from rankloss.options import check_count as check_count
from rankloss.options import check_weight as check_weight
from rankloss.precision import outside_graphs as outside_graphs
from rankloss.precision import product as product
from rankloss.precision import widest_dtype as widest_dtype
