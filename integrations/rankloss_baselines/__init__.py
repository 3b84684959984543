"""CyCLIP and ALIP, the losses that RankCLIP is compared with: a package like any other's.

It uses public names of rankloss alone, and registers ``--loss cyclip`` and ``--loss alip`` through the entry
points ``rankloss.losses``.
"""

from rankloss_baselines.alip import AlipLoss as AlipLoss
from rankloss_baselines.cyclip import CyClipLoss as CyClipLoss

__all__ = ["AlipLoss", "CyClipLoss"]
