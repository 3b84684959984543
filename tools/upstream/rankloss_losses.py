"""A factory for ``--loss rankloss_losses:create`` of the patched trainer: a loss of rankloss by its name."""

from __future__ import annotations

from typing import Any

import rankloss
import rankloss_trainers


def create(args: Any, name: str, **options: Any) -> Any:
    """The loss of this name on CLIP's, or with ``--siglip`` on SigLIP's, gathered as the flags say."""
    if args.siglip:
        # SigLIP's loss is exact whatever the flags say, and so must the terms beside it be.
        gather = rankloss.Gather(local_loss=True, gather_with_grad=True)
        base = rankloss.SigLipLoss(gather=gather)
    else:
        gather = rankloss.Gather(local_loss=args.local_loss, gather_with_grad=args.gather_with_grad)
        base = rankloss.ClipLoss(gather=gather)
    if name == "base":
        return base
    return rankloss_trainers.create(name, base, **options)
