"""The state of a loss as one entry of somebody's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def has_state(loss: nn.Module) -> bool:
    """Whether a loss has anything to save."""
    return bool(loss.state_dict())


def saved(name: str, loss: nn.Module) -> dict[str, Any]:
    """A copy of the loss's state on the CPU, of tensors and containers only.

    Args:
        name: The loss, as the catalogue names it.
        loss: The loss.
    """
    state = {key: value.detach().to("cpu", copy=True) for key, value in loss.state_dict().items()}
    return {"loss": name, "state_dict": state}


def restore(name: str, loss: nn.Module, state: Mapping[str, Any] | None) -> str:
    """Load what :func:`saved` gave; a tensor may have become a list of numbers in between.

    Returns:
        What was found instead of this loss's state, as the end of a sentence; empty if it was loaded.
    """
    if state is None:
        return "no state of a loss"
    if state["loss"] != name:
        return f"the state of --loss {state['loss']}"
    own = loss.state_dict()
    dtypes = {key: own[key].dtype if key in own else None for key in state["state_dict"]}
    loss.load_state_dict(
        {key: torch.as_tensor(x, dtype=dtypes[key]) for key, x in state["state_dict"].items()}
    )
    return ""
