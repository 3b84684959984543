"""The state of a loss in the trainer's checkpoints.

The trainer saves its model and its optimizer, and knows nothing of a loss with a state. So the state travels
with the optimizer's: a hook, which torch's optimizers have for the purpose, adds it to what they save, and
whatever the trainer does with a checkpoint (keep, delete, rename, upload) it does with the state. A trainer
without the plug-in reads such a checkpoint as any other: torch ignores the addition.

An optimizer does not hand out what it ignored, and the trainer restores it before it builds the loss. So the
state is kept from where the trainer reads the file until the resumed run's first epoch begins. Only the run
that resumed from this file is given it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from rankloss_trainers import state

KEY = "rankloss_open_clip"
"""Where the state is, in a checkpoint's ``optimizer``."""

_logger = logging.getLogger("rankloss_open_clip")
_read: tuple[str, dict[str, Any] | None] | None = None  # the last file, and the state that it holds


def pick_up(path: str, checkpoint: Any) -> None:
    """Keep the state that a checkpoint holds, if it holds one.

    Args:
        path: The checkpoint's file.
        checkpoint: What the trainer read from it.
    """
    global _read
    optimizer = checkpoint.get("optimizer") if isinstance(checkpoint, dict) else None
    _read = (path, optimizer.get(KEY) if isinstance(optimizer, dict) else None)


def restore(loss: nn.Module, name: str, path: str | None, *, warn: bool) -> None:
    """Give the loss of a run that begins its state back, if the run was resumed; forget what was kept.

    Args:
        loss: The loss.
        name: The value of ``--loss``.
        path: The file that the run resumes from, None for a fresh run.
        warn: Whether this process logs a warning where the checkpoint has no such state.
    """
    global _read
    read, _read = _read, None
    if path is None or not state.has_state(loss):
        return
    found = state.restore(name, loss, read[1] if read is not None and read[0] == path else None)
    if found and warn:
        _logger.warning(
            "--loss %s has a state that belongs to the run, and the checkpoint resumed from holds %s: it "
            "starts anew",
            name,
            found,
        )


def save_with(optimizer: Any, loss: nn.Module, name: str, *, sharded: bool = False) -> None:
    """Add the state of a loss, if it has one, to what an optimizer saves from now on.

    Args:
        optimizer: The trainer's optimizer.
        loss: The loss.
        name: The value of ``--loss``.
        sharded: Whether FSDP collects the optimizer's state, which takes only what it knows.
    """
    if not state.has_state(loss):
        return
    if sharded:
        _logger.warning("--loss %s has a state that --fsdp does not save: a resumed run starts it anew", name)
        return

    def add(_: Any, state_dict: dict[str, Any]) -> Mapping[str, Any]:
        return {**state_dict, KEY: state.saved(name, loss)}

    optimizer.register_state_dict_post_hook(add)
