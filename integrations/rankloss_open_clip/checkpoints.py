"""The state of a loss in the trainer's checkpoints.

The trainer saves its model and its optimizer, and knows nothing of a loss with a state. So the state travels
with the optimizer's: a hook, which torch's optimizers have for the purpose, adds it to what they save, and
whatever the trainer does with a checkpoint (keep, delete, rename, upload) it does with the state. A trainer
without the plug-in reads such a checkpoint as any other: torch ignores the addition.

An optimizer does not hand out what it ignored, and the trainer restores it before it builds the loss. So the
state is picked up where the trainer reads the file, and kept until the first epoch begins.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rankloss_open_clip.loss import TrainerLoss

KEY = "rankloss_open_clip"
"""Where the state is, in a checkpoint's ``optimizer``."""

_logger = logging.getLogger("rankloss_open_clip")
_read: dict[str, Any] | None = None


def pick_up(checkpoint: Any) -> None:
    """Keep the state that a checkpoint holds, if it holds one."""
    global _read
    optimizer = checkpoint.get("optimizer") if isinstance(checkpoint, dict) else None
    _read = optimizer.get(KEY) if isinstance(optimizer, dict) else None


def restore(loss: TrainerLoss, name: str, *, warn: bool) -> None:
    """Give a loss the state that was picked up.

    Args:
        loss: What the trainer trains with.
        name: The value of ``--loss``.
        warn: Whether to say so, in this process, where there is none.
    """
    if not loss.criterion.state_dict():
        return
    if _read is not None and _read["loss"] == name:
        loss.criterion.load_state_dict(_read["state_dict"])
    elif warn:
        found = "no state of a loss" if _read is None else f"the state of --loss {_read['loss']}"
        _logger.warning(
            "--loss %s has a state that belongs to the run, and the checkpoint resumed from holds %s: it "
            "starts anew",
            name,
            found,
        )


def save_with(optimizer: Any, loss: TrainerLoss, name: str, *, sharded: bool = False) -> None:
    """Add the state of a loss, if it has one, to what an optimizer saves from now on.

    Args:
        optimizer: The trainer's optimizer.
        loss: What the trainer trains with.
        name: The value of ``--loss``.
        sharded: Whether FSDP collects the optimizer's state, which takes only what it knows.
    """
    if not loss.criterion.state_dict():
        return
    if sharded or not hasattr(optimizer, "register_state_dict_post_hook"):
        _logger.warning(
            "--loss %s has a state that %s does not save: a resumed run starts it anew",
            name,
            "--fsdp" if sharded else type(optimizer).__name__,
        )
        return

    def add(_: Any, state_dict: dict[str, Any]) -> Mapping[str, Any]:
        state: dict[str, Tensor] = {k: v.detach().cpu() for k, v in loss.criterion.state_dict().items()}
        return {**state_dict, KEY: {"loss": name, "state_dict": state}}

    optimizer.register_state_dict_post_hook(add)
