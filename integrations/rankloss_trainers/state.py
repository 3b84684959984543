"""The state of a loss as one entry of somebody's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_logger = logging.getLogger("rankloss_trainers")


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


def restore(name: str, loss: nn.Module, state: Mapping[str, Any] | None, *, warn: bool = True) -> None:
    """Load what :func:`saved` gave; a tensor may have become a list of numbers in between.

    Args:
        name: The loss, as the catalogue names it.
        loss: The loss.
        state: What the checkpoint that is resumed from holds; None for nothing.
        warn: Whether this process warns where that is not the state of this loss, which then keeps its own.
    """
    if state is None or state["loss"] != name:
        found = "no state of a loss" if state is None else f"the state of the loss {state['loss']}"
        if warn:
            text = "The loss %s has a state, of which the checkpoint resumed from holds %s: it starts anew"
            _logger.warning(text, name, found)
        return
    own = loss.state_dict()
    dtypes = {key: own[key].dtype if key in own else None for key in state["state_dict"]}
    loss.load_state_dict(
        {key: torch.as_tensor(x, dtype=dtypes[key]) for key, x in state["state_dict"].items()}
    )
