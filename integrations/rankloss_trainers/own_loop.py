"""Losses by name for a loop of one's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from rankloss.distributed import GatherOption
from rankloss.losses import TEACHER
from rankloss_trainers.named import OptionError, Options
from rankloss_trainers.runtime import (
    METHODS,
    Host,
    Runtime,
    check_use_of_teacher,
    given_loss,
    innermost_of,
    two_steps,
    units_of,
)

HOST = Host(
    name="a loop of one's own",
    biased="a SigLipLoss as base",
    teacher=f"call it with {' and '.join(TEACHER)}, for instance rows of rankloss_features.Features(FOLDER)",
    progress="call set_epoch or set_progress",
    serves=("caption", "lists", "state", "parameters", "teacher"),
)


class JoinedLoss(nn.Module):
    """Losses joined by ``+``, called like each of them.

    Args:
        outermost: The last of them, which stands on the others.

    Attributes:
        base: The loss under all of them, which a validation calls: it does not grow with λ.
    """

    def __init__(self, outermost: nn.Module) -> None:
        super().__init__()
        self.outermost = outermost

    @property
    def base(self) -> Any:
        """The innermost base."""
        return innermost_of(self.outermost)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sum of the terms of all, or with ``output_dict`` the terms."""
        return self.outermost(*args, **kwargs)


def created(name: str, base: Any, gather: GatherOption, options: Options) -> nn.Module:
    """See :func:`rankloss_trainers.create`."""
    chosen = given_loss(name, options)
    run = Runtime(HOST, chosen, base=base, gather=gather)
    for part in chosen.parts:
        own = options if part is chosen else options.get(part.name, {})
        for key in (key for key, option in part.options().items() if option.for_trainer and key in own):
            advice = f"; {two_steps(HOST, own[key])}" if key == "teacher" else ""
            raise OptionError(key, f"is for a trainer's plug-in, which acts on it; got {own[key]!r}{advice}")
    loss = JoinedLoss(run.criterion) if len(chosen.parts) > 1 else run.criterion
    if "required" in (run.teacher, chosen.use_of_teacher) or chosen.use_of_teacher == "none":
        hook = functools.partial(_check_call, name, run.teacher)  # which can be pickled
        loss.register_forward_pre_hook(hook, with_kwargs=True)
    for unit, method in METHODS.items():
        setattr(loss, method, functools.partial(_tell, run.criterion, unit))
    return loss


def _tell(loss: nn.Module, unit: str, now: int, end: int) -> None:
    """Tell all parts of a loss that have the method where training stands."""
    for part in loss.modules():
        units_of(part).get(unit, lambda *_: None)(part, now, end)


def _check_call(name: str, use: str, module: nn.Module, args: Any, inputs: Mapping[str, Any]) -> None:  # noqa: ARG001
    found = [x for x in TEACHER if inputs.get(x) is not None]
    check_use_of_teacher(name, use, HOST.teacher, found)
