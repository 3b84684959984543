"""The state of a loss in the trainer's checkpoints.

The trainer saves its model and its optimizer, and knows nothing of a loss with a state. So the state travels
with the optimizer's: a hook, which torch's optimizers have for the purpose, adds it to what they save, and
whatever the trainer does with a checkpoint (keep, delete, rename, upload) it does with the state. A trainer
without the plug-in reads such a checkpoint as any other: torch ignores the addition.

An optimizer does not hand out what it ignored, and the trainer restores it before it builds the loss. So the
state is kept from where the trainer reads the file until the run's first epoch begins.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rankloss_trainers import state

KEY = "rankloss_open_clip"
"""Where the state is, in a checkpoint's ``optimizer``."""

_read: dict[str, Any] | None = None  # the state in the checkpoint that was read last


def pick_up(checkpoint: Any) -> None:
    """Keep the state that a checkpoint holds, if it holds one."""
    global _read
    optimizer = checkpoint.get("optimizer") if isinstance(checkpoint, dict) else None
    _read = optimizer.get(KEY) if isinstance(optimizer, dict) else None


def connect(loss: nn.Module, args: Any, optimizer: Any, epoch: int) -> None:
    """Give the loss of a run that begins its state back, if it has one, and let checkpoints have it.

    Args:
        loss: The loss.
        args: The trainer's arguments.
        optimizer: The trainer's optimizer.
        epoch: The run's first epoch, counted from 0.
    """
    global _read
    read, _read = _read, None
    if not state.has_state(loss):
        return
    if getattr(args, "resume", None) is not None:
        # A file of weights alone begins at epoch 0, and has no state to miss.
        warn = epoch > 0 and getattr(args, "rank", 0) == 0
        state.restore(args.loss, loss, read, warn=warn)
    if not getattr(args, "fsdp", False):  # collects the optimizer's state, and takes only what it knows
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, KEY: state.saved(args.loss, loss)})
