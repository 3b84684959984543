"""A factory for ``--loss rankloss_losses:create`` of the patched trainer: a loss of rankloss by its name."""

from __future__ import annotations

from typing import Any

import rankloss
import rankloss_trainers


def create(args: Any, name: str, **options: Any) -> Any:
    """The loss of this name on CLIP's, or with ``--siglip`` on SigLIP's, gathered as the flags say."""
    flags = {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad}
    if args.siglip:  # exact whatever the flags say, and so must the terms beside it be
        flags = dict.fromkeys(flags, True)
    gather = rankloss.Gather(**flags)
    base = rankloss.SigLipLoss(gather=gather) if args.siglip else rankloss.ClipLoss(gather=gather)
    return base if name == "base" else rankloss_trainers.create(name, base, **options)
