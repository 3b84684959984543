"""The state of a loss in the trainer's checkpoints, with its options and the course of its training.

The trainer saves its model and its optimizer, and knows nothing of a loss with a state. So the state travels
with the optimizer's: a hook, which torch's optimizers have for the purpose, adds it to what they save, and
the state goes wherever the checkpoint goes (kept, deleted, renamed, uploaded). A trainer without the plug-in
reads such a checkpoint as any other: torch ignores the addition.
"""

from __future__ import annotations

from typing import Any

import fsspec
import torch

from rankloss_trainers.runtime import Runtime

KEY = "rankloss_open_clip"
"""The key of the state, in a checkpoint's ``optimizer``."""


def connect(loss: Runtime, args: Any, optimizer: Any, epoch: int) -> None:
    """When a run begins, restore the state of its loss if it is resumed, and let checkpoints have the state.

    Under FSDP neither is possible, and a state starts anew.

    Args:
        loss: The loss.
        args: The trainer's arguments, with the path of the checkpoint as ``resume``.
        optimizer: The trainer's optimizer; None of a fork whose epochs take none.
        epoch: The run's first epoch, counted from 0.

    Raises:
        RuntimeError: The loss has a state of tensors, and there is no optimizer.
        ValueError: As :meth:`rankloss_trainers.runtime.Runtime.restore`.
    """
    has_state = bool(loss.criterion.state_dict())
    if optimizer is None:
        if has_state:
            raise RuntimeError(
                f"{loss.name} has a state, and this trainer's epochs no optimizer to save it with"
            )
        return  # without a state only the text about the training is lost

    # A file of weights alone begins at epoch 0, and has no state to miss.
    is_resumed = getattr(args, "resume", None) is not None and epoch > 0
    warn = getattr(args, "rank", 0) == 0
    is_sharded = getattr(args, "fsdp", False)
    if is_sharded:  # FSDP saves the optimizer's own entries alone, so that no checkpoint has a state
        if is_resumed and has_state:
            loss.restore(None, warn=warn)  # which warns that the state starts anew
        return
    if is_resumed:
        loss.restore(_state_in(args.resume), warn=warn)

    def with_state_of_loss(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, KEY: loss.saved()}

    optimizer.register_state_dict_post_hook(with_state_of_loss)


def _state_in(checkpoint: str) -> Any:
    """The state of a loss in a checkpoint's file; None in that of a run without rankloss."""
    with fsspec.open(checkpoint, "rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
    return content["optimizer"].get(KEY)
