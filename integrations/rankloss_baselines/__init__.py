"""The baselines, losses that RankCLIP is compared with: a package like any other's.

It uses public names of rankloss alone, and registers each for ``--loss`` by an entry point of the group
``rankloss.losses``.
"""

from rankloss_baselines.alip import AlipLoss as AlipLoss
from rankloss_baselines.cyclip import CyClipLoss as CyClipLoss

__all__ = ["AlipLoss", "CyClipLoss"]
