"""The module of several losses, each on the one before, the first on the trainer's own or in its place."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

import rankloss
from rankloss.distributed import Gather
from rankloss.losses.composition import base_under, call_arguments
from rankloss_trainers.declared import Loss
from rankloss_trainers.option import naming_options

_STREAMING = {"chunk_size", "memory_budget"}
"""Options of rankloss's losses that bound their memory."""
PAIRS = ("ClipLoss", "SigLipLoss")
"""Classes of losses of pairs; open_clip's have the same names."""
OF_TARGETS = ("same_id", "label_smoothing")
"""Attributes of a loss of pairs, false in one whose targets are the pairs themselves."""


def base_of(losses: Sequence[Loss], gather: Gather, kind: type | None = None) -> nn.Module:
    """A loss of pairs for losses to stand on, in the memory that an option of theirs gives them.

    Args:
        losses: The losses.
        gather: The gathering.
        kind: Its class. None: SigLIP's under a loss that needs it, else CLIP's.
    """
    streaming: dict[str, Any] = {}
    owner = ""  # the last loss that has such an option
    for loss in losses:
        given = {key: loss.given[key] for key in sorted(_STREAMING & loss.given.keys())}
        is_of_rankloss = loss.package == ""  # another package's option of this name may mean something else
        if given and is_of_rankloss:
            streaming.update(given)
            owner = loss.name
    make: Any = kind
    if make is None:
        is_sigmoid = any(loss.named.kind == "sigmoid" for loss in losses)
        make = rankloss.SigLipLoss if is_sigmoid else rankloss.ClipLoss
    with naming_options(streaming, owner):
        base: nn.Module = make(gather=gather, **streaming)
    return base


def composed(losses: Sequence[Loss], base: Any, gather: Gather, biased: str) -> nn.Module:
    """The module of the last loss, which stands on those before it, and they on a base or in its place.

    Args:
        losses: The losses, the innermost first.
        base: The loss of the trainer.
        gather: The gathering.
        biased: The trainer's set-up whose own loss is a sigmoid loss, for the errors.

    Raises:
        ValueError: A loss does not work on the one below it, or has a wrong option.
    """
    is_sigmoid = _is_a("SigLipLoss", base)
    _check_kinds(losses, is_sigmoid, biased)
    below = base
    for loss in losses:
        if loss.replaces:
            _check_replaced(loss, below)
            loss = _with_streaming_of(below, loss)
        built = loss.build(below, gather)
        if not isinstance(built, nn.Module):
            raise ValueError(f"{loss.name} builds no module; got {built!r}")
        would_drop_the_one_before = below is not base and not any(part is below for part in built.modules())
        if would_drop_the_one_before:
            raise ValueError(f"{loss.name} stands on no other loss but the trainer's: name it first")
        below = built
    module: nn.Module = below
    stands_on_base = any(part is base for part in module.modules())
    if is_sigmoid and not stands_on_base:
        _check_no_softmax(module, biased)
    return module


def _check_kinds(losses: Sequence[Loss], is_sigmoid: bool, biased: str) -> None:
    """Raise a ValueError for a loss that does not work beside the trainer's sigmoid or softmax loss."""
    for loss in losses:
        if is_sigmoid and loss.named.kind == "softmax":
            raise ValueError(f"{loss.name} does not work with {biased}: it is a softmax loss")
        if not is_sigmoid and loss.named.kind == "sigmoid":
            raise ValueError(f"{loss.name} needs {biased}: it is a sigmoid loss")


def _with_streaming_of(replaced: Any, loss: Loss) -> Loss:
    """The loss, with the chunks and the budget of the one that it replaces where it names no others."""
    streaming = getattr(replaced, "streaming", {})
    kept = {key: value for key, value in streaming.items() if key in loss.named.options}
    return dataclasses.replace(loss, given={**kept, **loss.given})


def innermost(loss: Any) -> Any:
    """The loss under all others."""
    while (below := base_under(loss)) is not None:
        loss = below
    return loss


def arguments_of(loss: nn.Module, *names: str) -> list[inspect.Parameter]:
    """The arguments of these names that the parts of a loss are called with."""
    of_parts = [call_arguments(part) for part in loss.modules()]
    return [arguments[name] for arguments in of_parts for name in names if name in arguments]


def _is_a(name: str, loss: Any) -> bool:
    """True if the class of the loss, or one it is derived from, has this name: rankloss's or open_clip's."""
    return any(each.__name__ == name for each in type(loss).__mro__)


def _check_no_softmax(module: nn.Module, biased: str) -> None:
    """Raise a ValueError for a module whose loss of pairs would not depend on the bias."""
    below = innermost(module)
    if not _is_a("ClipLoss", below):
        return
    name = type(module).__name__
    text = f"{name} does not work with {biased}"
    if below is module:
        raise ValueError(f"{text}: it is a softmax loss; give SigLipLoss")
    raise ValueError(
        f"{text}: it stands on {type(below).__name__}, a softmax loss; build {name} on a SigLipLoss"
    )


def _check_replaced(loss: Loss, base: Any) -> None:
    """Raise a ValueError for a base of another formula, or with targets that would be lost."""
    text = f"{loss.name} replaces the trainer's loss, and"
    if type(base).__name__ not in PAIRS:
        raise ValueError(f"{text} cannot replace {type(base).__name__}")
    if loss.named.replaces:  # it is built from the base, and keeps or refuses them itself
        return
    for key in OF_TARGETS:
        if value := getattr(base, key, None):
            raise ValueError(f"{text} would lose its {key}={value!r}")
