"""Losses by name for a loop of one's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import rankloss
from rankloss.distributed import Gather, GatherOption
from rankloss.losses import TEACHER
from rankloss.options import check_position
from rankloss_trainers.catalog import JOIN, choose, choose_each, names_of
from rankloss_trainers.declared import Loss, Named, Options
from rankloss_trainers.host import Host
from rankloss_trainers.option import OptionError
from rankloss_trainers.progress import METHODS, listeners, units_of
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Runtime
from rankloss_trainers.teaching import Teaching

HOST = Host(
    name="a loop of one's own",
    biased="a SigLipLoss as base",
    teacher=f"call it with {' and '.join(TEACHER)}, for instance rows of rankloss_features.Features(FOLDER)"
    ", a folder of `rankloss features` or of rankloss_features.caching.compute_features",
    progress="call set_epoch or set_progress",
    serves=("columns", "ids", "lists", "state", "parameters", "folder"),
)
BASES = {"clip": rankloss.ClipLoss, "siglip": rankloss.SigLipLoss}
"""Losses of pairs by name, alone or as the first of joined ones."""


class CreatedLoss(nn.Module):
    """Joined losses, or one that tells not all of its parts or has no base; it is called like its module.

    Args:
        loss: The module of the last loss, which stands on the others.
        base: The loss of pairs to evaluate.
    """

    def __init__(self, loss: nn.Module, base: Any) -> None:
        super().__init__()
        self.loss = loss
        self._held_base = [base]  # in a list, so that it is no submodule: a loss may replace it

    @property
    def base(self) -> Any:
        """The loss under all others, which a validation calls: it does not grow with λ."""
        (base,) = self._held_base
        return base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, or with ``output_dict`` its terms by name."""
        return self.loss(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The method that tells all parts; else the attribute of the outermost loss that has it."""
        # Here, and not methods of the class, by which a trainer would tell the parts a second time.
        if name == METHODS["epoch"]:
            return functools.partial(_set_epoch, self.loss)
        if name == METHODS["step"]:
            return functools.partial(_set_progress, self.loss)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "loss":  # of an object that is being made, or unpickled
                raise
        owner: Any = self.loss
        while not hasattr(owner, name) and isinstance(getattr(owner, "base", None), nn.Module):
            owner = owner.base
        return getattr(owner, name)


def created(name: str, base: Any, gather: GatherOption, teacher: str | None, options: Options) -> nn.Module:
    """See :func:`rankloss_trainers.create`."""
    if not isinstance(name, str):
        raise TypeError(f"name must be the name of a loss; got {name!r}")
    first = name.partition(JOIN)[0]
    if first not in BASES:
        losses = choose(name, options)
    elif base is not None:
        raise ValueError(f"base and {first} are two bases; got {base!r}")
    else:
        base, losses = _on_named_base(name, gather, options)
    if not losses and teacher is not None:
        raise OptionError("teacher", f"{name} does not use a teacher; got {teacher!r}")
    gather_of_base = getattr(base, "gather", None)
    if gather is None and isinstance(gather_of_base, Gather) and gather_of_base != Gather():
        gather = gather_of_base  # which its user has chosen
    for loss in losses:
        loss.refuse_column_options("is for a trainer that reads the data: give the inputs at each call")
    run = Runtime(HOST, losses, RunOptions(teacher=teacher), base=base, gather=gather)
    module = _with_progress(run)
    if run.teaching.use != "optional":  # each call has to have a teacher's features, or must have none
        run.teaching.name = name  # for its errors, with the base's name
        hook = functools.partial(_before_call, run.teaching)  # which can be pickled
        module.register_forward_pre_hook(hook, with_kwargs=True)
    return module


def _with_progress(run: Runtime) -> nn.Module:
    """The module of a run, in a :class:`CreatedLoss` unless its own methods and ``base`` do as well."""
    module = run.criterion
    parts_to_tell = [part for part in module.modules() if units_of(part)]
    has_methods = all(hasattr(module, method) for method in METHODS.values())
    tells_all = has_methods and parts_to_tell in ([], [module])  # its methods tell the module alone
    is_joined = len(run.losses) != 1
    if is_joined or not tells_all or not hasattr(module, "base"):
        return CreatedLoss(module, run.base_to_evaluate)
    return module


def _on_named_base(name: str, gather: GatherOption, options: Options) -> tuple[Any, list[Loss]]:
    """The loss of pairs that a name begins with, and the losses that are joined to it.

    Args:
        name: One of :data:`BASES`, alone or followed by others.
        gather: The gathering of the base.
        options: Options of the base, if it is alone; of joined losses by the name of each.
    """
    first, _, others = name.partition(JOIN)
    is_joined = JOIN in name
    of_base = options.get(first, {}) if is_joined else options
    if not isinstance(of_base, Mapping):
        raise TypeError(f"options of {first} must be a mapping; got {of_base!r}")
    base = Loss(first, Named(BASES[first]), of_base).build(base=None, gather=Gather.of(gather))
    if not is_joined:
        return base, []
    of_others = {key: value for key, value in options.items() if key != first}
    return base, choose_each(names_of(others), of_others)


def _set_epoch(loss: nn.Module, epoch: int, epochs: int) -> None:
    """Tell all parts of a loss that can be told that an epoch begins; its arguments are ``set_epoch``'s."""
    check_position("epoch", epoch, "epochs", epochs)
    for set_epoch in listeners(loss, "epoch", preferred="epoch"):
        set_epoch(epoch, epochs)


def _set_progress(loss: nn.Module, step: int, total_steps: int) -> None:
    """Tell all parts of a loss that can be told that a step begins; its arguments are ``set_progress``'s."""
    check_position("step", step, "total_steps", total_steps)
    for set_progress in listeners(loss, "step", preferred="step"):
        set_progress(step, total_steps)


def _before_call(teaching: Teaching, _: nn.Module, args: Sequence[Any], inputs: Mapping[str, Any]) -> None:
    """Check a teacher's features, and let the loss have the components to copy them."""
    by_position = {"image_features": args[0]} if args else {}  # a teacher's are by keyword alone
    teaching.inputs({**by_position, **inputs})
