"""The patches that are applied to open_clip's modules after they are loaded.

Each wraps functions by name, once, and keeps their name, signature and source visible. None of them changes a
run without ``--loss``. :mod:`rankloss_open_clip.training` imports open_clip itself, so it is imported by the
first call that needs it.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rankloss_open_clip import checkpoints, command_line
from rankloss_open_clip.companions import COMPANION, join_csv, joined_samples, joined_tokenizer

Original = Callable[..., Any]
Wrapper = Callable[[Original], Original]
Act = Callable[[Original, inspect.BoundArguments], Any]


def patch(module: ModuleType) -> None:
    """Patch one of the modules that :mod:`rankloss_open_clip.bootstrap` waits for.

    Args:
        module: The module.

    Raises:
        AttributeError: No function is there to patch, or the parser is not argparse's.
        TypeError: A function has other parameters than in open_clip's trainer.
    """
    if not _wrap(vars(module), _WRAPPERS):
        raise AttributeError(f"{module.__name__} has none of {', '.join(_WRAPPERS)}")


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
    wrappers = {name: wrapper for name, wrapper in _WRAPPERS.items() if not name.startswith("create_")}
    _wrap(vars(module), {create_loss: _WRAPPERS["create_loss"], **wrappers})
    if hasattr(module, "get_data"):
        _wrap(_names_of(module.get_data), wrappers)  # what reads the data


# --- wrapping -------------------------------------------------------------------------------------------

_PATCHED = "_rankloss_open_clip_patched"


def _wrap(names: dict[str, Any], wrappers: Mapping[str, Wrapper]) -> bool:
    """Wrap the functions that a module's namespace has, each once; whether it has any."""
    found = {name: names[name] for name in wrappers if name in names}
    replaced = {}
    for name, original in found.items():
        # The mark sits on the function, not on the module: a reloaded module has new functions to patch.
        if not getattr(original, _PATCHED, False):
            replaced[name] = functools.wraps(original)(wrappers[name](original))
            setattr(replaced[name], _PATCHED, True)
    names.update(replaced)
    return bool(found)


def _names_of(function: Original) -> Any:
    """What a function's module defines, by name."""
    return inspect.unwrap(function).__globals__


def _with_loss(act: Act, *layouts: set[str]) -> Wrapper:
    """Call ``act`` in place of a function that has one of these parameters, in a run with ``--loss``."""

    def wrapper(original: Original) -> Original:
        signature = inspect.signature(original)
        if not any(layout <= signature.parameters.keys() for layout in layouts):
            raise TypeError(f"{original.__module__}.{original.__name__} has unknown parameters: {signature}")

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if command_line.requested(bound.arguments["args"]) is None:
                return original(*args, **kwargs)
            return act(original, bound)

        return call

    return wrapper


def _parsing(original: Original) -> Original:
    names = _names_of(original)
    if names.get("argparse") is not argparse:
        raise AttributeError(f"{original.__module__} does not use argparse")
    with_parser = ModuleType("argparse")
    vars(with_parser).update(vars(argparse), ArgumentParser=command_line.TrainerParser)

    def parse_args(*args: Any, **kwargs: Any) -> Any:
        # The parser is created, filled and used inside the call, so the module is replaced during it.
        names["argparse"] = with_parser
        try:
            return original(*args, **kwargs)
        finally:
            names["argparse"] = argparse

    return parse_args


def _loading(original: Original) -> Original:
    def pt_load(*args: Any, **kwargs: Any) -> Any:
        checkpoint = original(*args, **kwargs)
        checkpoints.pick_up(checkpoint)
        return checkpoint

    return pt_load


# --- what is called in a run with --loss ------------------------------------------------------------------


def _create_loss(original: Original, bound: inspect.BoundArguments) -> Any:
    from rankloss_open_clip.training import build_loss

    base = original(*bound.args, **bound.kwargs)
    # This trainer adds up every value of the dict that a loss returns.
    return build_loss(base, bound.arguments["args"], sums_every_value=True)


def _create_task(original: Original, bound: inspect.BoundArguments) -> Any:
    from rankloss_open_clip.training import build_loss

    options = bound.arguments["args"]
    task = original(*bound.args, **bound.kwargs)
    if getattr(task, "loss", None) is None or getattr(task, "primary_key", "image") != "image":
        raise ValueError(
            f"--loss {options.loss} needs a task that compares images with texts, got {type(task).__name__}"
        )
    # A task adds up the keys that end in `_loss`, and logs the others.
    task.loss = build_loss(task.loss, options, sums_every_value=False)
    return task


def _train_one_epoch(original: Original, bound: inspect.BoundArguments) -> Any:
    from rankloss_open_clip.training import start_epoch

    given = bound.arguments
    if "state" in given:  # of open_clip's later trainer: it holds the task, and the task model and loss
        state = given["state"]
        given = {**vars(state), **given, "loss": state.task.loss, "model": state.task.trainable_module}
    start_epoch(given)
    return original(*bound.args, **bound.kwargs)


def _get_dataset(original: Original, bound: inspect.BoundArguments) -> Any:
    given, options = bound.arguments, bound.arguments["args"]
    companion = command_line.companion_of(options) if given["is_train"] else None
    if companion is None:
        return original(*bound.args, **bound.kwargs)
    given["tokenizer"] = joined_tokenizer(given["tokenizer"], companion)
    # A webdataset's pipeline is built inside the call, so the reader is replaced during it.
    names, reader = _names_of(original), "tarfile_to_samples_nothrow"
    read: Any = names.get(reader)
    text_keys = getattr(options, "text_key", None) or "txt"
    names[reader] = functools.partial(joined_samples, read, companion, text_keys)
    try:
        info = original(*bound.args, **bound.kwargs)
    finally:
        names[reader] = read
    dataset = getattr(info.dataloader, "dataset", None)
    if hasattr(dataset, "captions"):  # of a CSV file
        join_csv(dataset, options.train_data, options.csv_separator, companion)
    setattr(info, COMPANION, companion)
    return info


_WRAPPERS: dict[str, Wrapper] = {
    "create_loss": _with_loss(_create_loss, {"args"}),
    "create_task": _with_loss(_create_task, {"args"}),
    "train_one_epoch": _with_loss(
        _train_one_epoch, {"data", "args", "loss", "epoch"}, {"data", "args", "state"}
    ),
    "get_csv_dataset": _with_loss(_get_dataset, {"args"}),
    "get_wds_dataset": _with_loss(_get_dataset, {"args"}),
    "parse_args": _parsing,
    "pt_load": _loading,
}
