"""Ranking-consistency losses for CLIP training.

The losses are modules (:class:`RankConsistency`, :class:`RankClipLoss`, :class:`ClipLoss`,
:class:`SigLipLoss`, :class:`SpreadLoss`, :class:`MimicryLoss`, :class:`RankedLists`). :class:`RankOptions`
has the options of the rank terms, :class:`Gather` configures the gathering from processes, and
:func:`plackett_luce_nll` is the loss of one list. Losses of one's own are written on :class:`AddedTerms` or
:class:`OwnTerms`.
"""

from rankloss import distributed as distributed
from rankloss import functional as functional
from rankloss import metrics as metrics
from rankloss import reference as reference
from rankloss import schedules as schedules
from rankloss._version import __version__ as __version__
from rankloss.distributed import Gather as Gather
from rankloss.functional import plackett_luce_nll as plackett_luce_nll
from rankloss.losses import AddedTerms as AddedTerms
from rankloss.losses import ClipLoss as ClipLoss
from rankloss.losses import InputWarning as InputWarning
from rankloss.losses import MimicryLoss as MimicryLoss
from rankloss.losses import OwnTerms as OwnTerms
from rankloss.losses import RankClipLoss as RankClipLoss
from rankloss.losses import RankConsistency as RankConsistency
from rankloss.losses import RankedLists as RankedLists
from rankloss.losses import SigLipLoss as SigLipLoss
from rankloss.losses import SpreadLoss as SpreadLoss
from rankloss.options import RankOptions as RankOptions
