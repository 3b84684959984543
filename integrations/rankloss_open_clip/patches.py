"""The patches that are applied to open_clip's modules after they are loaded.

Each wraps functions by name, once, and keeps their name, signature and source visible. None of them changes a
run without ``--loss``. What needs torch is imported by the first call that needs it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

from rankloss_open_clip import command_line, names, versions

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from rankloss_open_clip.companions import Companion

_PATCHED = "_rankloss_open_clip_patched"
_COMPANION = "_rankloss_open_clip_companion"  # of the training data, where the loss needs one

# What every loss depends on, and what only a loss depends on that needs more of the data than pairs.
_PATCHED_NAMES = {
    "open_clip.factory": ("create_loss", "create_task"),
    "open_clip": ("create_loss", "create_task"),
    "open_clip_train.params": ("parse_args",),
    "open_clip_train.train": ("train_one_epoch",),
    "open_clip_train.legacy_train": ("train_one_epoch",),
    "open_clip_train.main": ("create_loss", "create_task", "parse_args", "train_one_epoch", "pt_load"),
    "open_clip_train.legacy_main": ("create_loss", "parse_args", "train_one_epoch", "pt_load"),
    "open_clip_train.file_utils": ("pt_load",),
}
_DATA_NAMES = {"open_clip_train.data": ("get_csv_dataset", "get_wds_dataset")}


def patch_factory(module: ModuleType) -> None:
    """Let ``create_loss``, and ``create_task`` where there is one, wrap the loss they build.

    Args:
        module: ``open_clip.factory``.

    Raises:
        AttributeError: The module has neither function.
    """
    if not hasattr(module, "create_loss") and not hasattr(module, "create_task"):
        raise AttributeError(f"{module.__name__} has neither create_loss nor create_task")
    if hasattr(module, "create_loss"):
        _wrap(module, "create_loss", _creating_loss)
    if hasattr(module, "create_task"):
        _wrap(module, "create_task", _creating_task)


def patch_params(module: ModuleType) -> None:
    """Let ``parse_args`` know the options of :mod:`rankloss_open_clip.command_line`.

    Args:
        module: ``open_clip_train.params``.

    Raises:
        AttributeError: The module has no ``parse_args``, or takes no parser class from argparse.
    """
    if _parser_name(module) is None:
        raise AttributeError(f"{module.__name__} does not use argparse's ArgumentParser")
    _wrap(module, "parse_args", functools.partial(_parsing, module, PatchedParser))


def patch_train(module: ModuleType) -> None:
    """Let ``train_one_epoch`` tell the ranking loss which epoch begins.

    Args:
        module: ``open_clip_train.train`` or ``open_clip_train.legacy_train``.

    Raises:
        AttributeError: The module has no ``train_one_epoch``.
        TypeError: Its parameters name neither the loss and the epoch nor a state that holds them.
    """
    _check_train_one_epoch(module)
    _wrap(module, "train_one_epoch", _training)


def _check_train_one_epoch(module: ModuleType) -> None:
    parameters = inspect.signature(module.train_one_epoch).parameters
    if not {"data", "args"} <= parameters.keys() or not (
        {"loss", "epoch"} <= parameters.keys() or "state" in parameters
    ):
        raise TypeError(f"{module.__name__}.train_one_epoch has unknown parameters: {', '.join(parameters)}")


def patch_data(module: ModuleType) -> None:
    """Let the readers of training data join what a loss needs of them to the captions.

    A module without them is left alone: few losses need more than pairs, see :func:`unpatched`.

    Args:
        module: ``open_clip_train.data``.
    """
    if hasattr(module, "get_csv_dataset"):
        _wrap(module, "get_csv_dataset", _reading_csv)
    if hasattr(module, "get_wds_dataset") and hasattr(module, "tarfile_to_samples_nothrow"):
        _wrap(module, "get_wds_dataset", functools.partial(_reading_shards, module))


def patch_file_utils(module: ModuleType) -> None:
    """Let ``pt_load`` hand the state of a loss in a checkpoint to :mod:`rankloss_open_clip.checkpoints`.

    Args:
        module: ``open_clip_train.file_utils``.
    """
    if hasattr(module, "pt_load"):
        _wrap(module, "pt_load", _loading)


def patch_trainer(module: ModuleType, create_loss: str = "create_loss") -> None:
    """Let a trainer that is laid out like open_clip's know ``--loss``; patch all of it, or nothing.

    Args:
        module: The trainer's main module, which holds, or imports by name, the functions ``parse_args``,
            ``train_one_epoch`` and the one that builds the loss.
        create_loss: The name of the last; it takes the parsed arguments as ``args``.

    Raises:
        AttributeError: The module has not these functions, or its parser is not argparse's.
        TypeError: Their parameters are others than in open_clip's trainer.
    """
    for name in (create_loss, "parse_args", "train_one_epoch"):
        if not callable(getattr(module, name, None)):
            raise AttributeError(f"{module.__name__} has no function {name}")
    if "args" not in inspect.signature(getattr(module, create_loss)).parameters:
        raise TypeError(f"{module.__name__}.{create_loss} has no parameter args")
    _check_train_one_epoch(module)
    params = _home(module, "parse_args")
    if _parser_name(params) is None:
        raise AttributeError(f"{params.__name__} does not use argparse's ArgumentParser")

    _wrap(module, create_loss, _creating_loss)
    _wrap(module, "parse_args", functools.partial(_parsing, params, _parser_of(module, create_loss)))
    _wrap(module, "train_one_epoch", _training)
    patch_file_utils(module)
    if hasattr(module, "get_data"):
        patch_data(_home(module, "get_data"))


def _parser_of(module: ModuleType, create_loss: str) -> type[PatchedParser]:
    class AttachedParser(PatchedParser):
        """The parser of an attached trainer."""

        def unpatched(self, *, data: bool) -> list[str]:
            """The functions of this trainer that are not patched."""
            needed = [(module, name) for name in (create_loss, "parse_args", "train_one_epoch")]
            if data:
                readers = _home(module, "get_data")
                needed += [(readers, name) for name in _DATA_NAMES["open_clip_train.data"]]
            return [
                f"{where.__name__}.{name}"
                for where, name in needed
                if not getattr(getattr(where, name, None), _PATCHED, False)
            ]

        def verdict(self, version: str) -> versions.Verdict:
            """The layout was recognised, so no version of open_clip is too old."""
            return versions.judge(version, attached=True)

    return AttachedParser


def _home(module: ModuleType, name: str) -> ModuleType:
    """The module that defines what another imports by name."""
    return sys.modules.get(getattr(getattr(module, name, None), "__module__", ""), module)


def unpatched(*, data: bool = False) -> list[str]:
    """Functions of open_clip that are loaded, that ``--loss`` depends on, and that are not patched.

    Args:
        data: Whether the loss depends on the readers of training data too.
    """
    names = {**_PATCHED_NAMES, **_DATA_NAMES} if data else _PATCHED_NAMES
    return [
        f"{name}.{attribute}"
        for name, attributes in names.items()
        for attribute in attributes
        if hasattr(sys.modules.get(name), attribute)
        and not getattr(getattr(sys.modules[name], attribute), _PATCHED, False)
    ]


def _wrap(module: ModuleType, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(module, name)
    # The mark sits on the function, not on the module: a reloaded module has new functions to patch.
    if getattr(original, _PATCHED, False):
        return
    replacement = functools.wraps(original)(wrapper(original))
    setattr(replacement, _PATCHED, True)
    setattr(module, name, replacement)
    # Modules that took the function by name before it was patched (attach() called late).
    for other, attributes in _PATCHED_NAMES.items():
        if name in attributes and getattr(sys.modules.get(other), name, None) is original:
            setattr(sys.modules[other], name, replacement)


def _creating_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def create_loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        options = bound.arguments["args"]
        if command_line.requested(options) is None:
            return original(*args, **kwargs)
        from rankloss_open_clip.training import build_loss

        bound.arguments["args"] = _base_arguments(options)
        base = original(*bound.args, **bound.kwargs)
        # This trainer adds up every value of the dict that a loss returns.
        return build_loss(base, options, sums_every_value=True)

    return create_loss


def _creating_task(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def create_task(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        options = bound.arguments["args"]
        if command_line.requested(options) is None:
            return original(*args, **kwargs)
        from rankloss_open_clip.training import build_loss

        bound.arguments["args"] = _base_arguments(options)
        task = original(*bound.args, **bound.kwargs)
        if getattr(task, "loss", None) is None or getattr(task, "primary_key", "image") != "image":
            raise ValueError(
                f"--loss {options.loss} needs a task that compares images with texts, got "
                f"{type(task).__name__}"
            )
        _compile_base(task.loss, options)
        # A task adds up the keys that end in `_loss`, and logs the others.
        task.loss = build_loss(task.loss, options, sums_every_value=False)
        return task

    return create_task


def _compile_base(base: Any, options: Any) -> None:
    """Compile the trainer's own loss alone, where it would have been compiled as a part of the task.

    The loss around it is not compiled (see :class:`rankloss_trainers.driven_loss.DrivenLoss`), nor would be
    what it calls.
    """
    strategy = getattr(options, "torchcompile_strategy", None)
    if getattr(options, "torchcompile", False) and strategy in ("task", "step"):
        given = {"backend": options.torchcompile_backend, "mode": options.torchcompile_mode}
        base.compile(**{name: value for name, value in given.items() if value is not None})


def _base_arguments(options: Any) -> Any:
    """The arguments for the factory of the base loss: a ``--loss`` of the trainer's own gets its default."""
    if not hasattr(options, names.BASE_LOSS):
        return options
    options = copy.copy(options)
    options.loss = getattr(options, names.BASE_LOSS)
    return options


def _parser_name(module: ModuleType) -> str | None:
    """The name through which a module reaches argparse's parser class."""
    if getattr(module, "argparse", None) is argparse:
        return "argparse"
    if getattr(module, "ArgumentParser", None) is argparse.ArgumentParser:
        return "ArgumentParser"
    return None


class PatchedParser(command_line.TrainerParser):
    """The trainer's parser, which knows what of the trainer is patched."""

    def unpatched(self, *, data: bool) -> list[str]:
        """See :func:`unpatched`."""
        return unpatched(data=data)


def _parsing(
    module: ModuleType, parser_class: type[PatchedParser], original: Callable[..., Any]
) -> Callable[..., Any]:
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        # The parser is created, filled and used inside the call, so the class is replaced during it.
        name = _parser_name(module)
        if name is None:
            return original(*args, **kwargs)  # a call from within a call
        replaced = getattr(module, name)
        replacement: Any = parser_class
        if name == "argparse":
            replacement = types.ModuleType("argparse")
            vars(replacement).update(vars(argparse), ArgumentParser=parser_class)
        setattr(module, name, replacement)
        try:
            return original(*args, **kwargs)
        finally:
            setattr(module, name, replaced)

    return parse_args


def _reading_csv(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def get_csv_dataset(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        options, companion = bound.arguments["args"], _companion(bound.arguments)
        if companion is None:
            return original(*args, **kwargs)
        from rankloss_open_clip.companions import JoinedTokenizer, join_csv

        bound.arguments["tokenizer"] = JoinedTokenizer(bound.arguments["tokenizer"], companion)
        info = original(*bound.args, **bound.kwargs)
        join_csv(info.dataloader.dataset, options.train_data, options.csv_separator, companion)
        setattr(info, _COMPANION, companion)
        return info

    return get_csv_dataset


def _reading_shards(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def get_wds_dataset(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        options, companion = bound.arguments["args"], _companion(bound.arguments)
        if companion is None:
            return original(*args, **kwargs)
        from rankloss_open_clip.companions import JoinedSamples, JoinedTokenizer

        bound.arguments["tokenizer"] = JoinedTokenizer(bound.arguments["tokenizer"], companion)
        # The pipeline is built inside the call, so the reader is replaced during it.
        read = module.tarfile_to_samples_nothrow
        vars(module)["tarfile_to_samples_nothrow"] = JoinedSamples(
            read, companion, getattr(options, "text_key", None) or "txt"
        )
        try:
            info = original(*bound.args, **bound.kwargs)
        finally:
            vars(module)["tarfile_to_samples_nothrow"] = read
        setattr(info, _COMPANION, companion)
        return info

    return get_wds_dataset


def _companion(given: dict[str, Any]) -> Companion | None:
    """What comes with the texts of training data."""
    return command_line.companion_of(given["args"]) if given["is_train"] else None


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def pt_load(*args: Any, **kwargs: Any) -> Any:
        checkpoint = original(*args, **kwargs)
        from rankloss_open_clip.checkpoints import pick_up

        path, *_ = signature.bind(*args, **kwargs).arguments.values()
        pick_up(path, checkpoint)
        return checkpoint

    return pt_load


def _training(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def train_one_epoch(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        options = given["args"]
        if command_line.requested(options) is not None:
            from rankloss_open_clip.training import start_epoch

            # The state of open_clip's later trainer holds the task, and the task holds model and loss.
            state = given.get("state")
            loss = given["loss"] if state is None else getattr(state.task, "loss", None)
            epoch = given["epoch"] if state is None else state.epoch
            optimizer = (given if state is None else vars(state)).get("optimizer")
            start_epoch(loss, epoch, given["data"], options, optimizer, given.get("tb_writer"))
            companion = getattr(given["data"]["train"], _COMPANION, None)
            if companion is not None:
                from rankloss_open_clip.companions import split_features

                split_features(given["model"] if state is None else state.task.trainable_module, companion)
        return original(*args, **kwargs)

    return train_one_epoch
