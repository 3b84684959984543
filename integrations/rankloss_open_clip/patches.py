"""The patches that are applied to open_clip's modules after they are loaded.

Each wraps functions by name, once, and keeps their name, signature and source visible. None of them changes a
run without ``--loss``. :mod:`rankloss_open_clip.training` imports open_clip itself, so it is imported by the
first call that needs it.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

from rankloss_open_clip import checkpoints, command_line
from rankloss_open_clip.companions import Companion, JoinedSamples, JoinedTokenizer, join_csv, split_features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

    Original = Callable[..., Any]
    Act = Callable[[Original, inspect.BoundArguments], Any]

_PATCHED = "_rankloss_open_clip_patched"
_COMPANION = "_rankloss_open_clip_companion"  # of the training data, where the loss needs one


def patch(module: ModuleType) -> None:
    """Patch one of the modules that :mod:`rankloss_open_clip.bootstrap` waits for.

    Args:
        module: The module.

    Raises:
        AttributeError: A function that every loss depends on is missing, or the parser is not argparse's.
        TypeError: The parameters of ``train_one_epoch`` name neither the loss and the epoch nor a state.
    """
    name = module.__name__.rpartition(".")[2]
    if name == "factory" and not (hasattr(module, "create_loss") or hasattr(module, "create_task")):
        raise AttributeError(f"{module.__name__} has neither create_loss nor create_task")
    if name == "params":
        _check_parser(module)
        _wrap(module, "parse_args", _parsing(module, missed))
    if name in ("train", "legacy_train"):
        _check_train_one_epoch(module)
    _wrap_those_of(module, _WRAPPERS)


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
    params, readers = _home(module, "parse_args"), _home(module, "get_data")
    _check_parser(params)

    def unread(*, data: bool) -> list[str]:
        return [f"{readers.__name__}.{name}" for name in _READERS if data and not _is_patched(readers, name)]

    _wrap(module, create_loss, _with_loss(_create_loss))
    _wrap(module, "parse_args", _parsing(params, unread))
    _wrap_those_of(module, ("train_one_epoch", "pt_load"))
    _wrap_those_of(readers, _READERS)


def missed(*, data: bool = True) -> list[str]:
    """Loaded functions of open_clip and its trainer that ``--loss`` needs, and that are not patched.

    Args:
        data: Whether the loss needs more of the training data than pairs.
    """
    names = [name for name in (*_WRAPPERS, "parse_args") if data or name not in _READERS]
    return [
        f"{module}.{name}"
        for module, loaded in sorted(sys.modules.items())
        if module in ("open_clip", "open_clip.factory") or module.startswith("open_clip_train.")
        for name in names
        if hasattr(loaded, name) and not _is_patched(loaded, name)
    ]


def _home(module: ModuleType, name: str) -> ModuleType:
    """The module that defines what another imports by name."""
    return sys.modules.get(getattr(getattr(module, name, None), "__module__", ""), module)


def _is_patched(module: ModuleType, name: str) -> bool:
    return getattr(getattr(module, name, None), _PATCHED, False)


def _check_train_one_epoch(module: ModuleType) -> None:
    parameters = inspect.signature(module.train_one_epoch).parameters
    if not {"data", "args"} <= parameters.keys() or not (
        {"loss", "epoch"} <= parameters.keys() or "state" in parameters
    ):
        raise TypeError(f"{module.__name__}.train_one_epoch has unknown parameters: {', '.join(parameters)}")


def _check_parser(module: ModuleType) -> None:
    if getattr(module, "argparse", None) is not argparse:
        raise AttributeError(f"{module.__name__} does not use argparse")


# --- wrapping -------------------------------------------------------------------------------------------


def _wrap(module: ModuleType, name: str, wrapper: Callable[[Original], Original]) -> None:
    original = getattr(module, name)
    # The mark sits on the function, not on the module: a reloaded module has new functions to patch.
    if getattr(original, _PATCHED, False):
        return
    replacement = functools.wraps(original)(wrapper(original))
    setattr(replacement, _PATCHED, True)
    setattr(module, name, replacement)


def _wrap_those_of(module: ModuleType, names: Iterable[str]) -> None:
    for name in names:
        if hasattr(module, name):
            _wrap(module, name, _WRAPPERS[name])


def _with_loss(act: Act) -> Callable[[Original], Original]:
    """Call ``act`` in place of a function that takes ``args``, in a run with ``--loss``."""

    def wrapper(original: Original) -> Original:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if command_line.requested(bound.arguments["args"]) is None:
                return original(*args, **kwargs)
            return act(original, bound)

        return call

    return wrapper


def _parsing(module: ModuleType, unpatched: Callable[..., list[str]]) -> Callable[[Original], Original]:
    class Parser(command_line.TrainerParser):
        """The parser that knows what of this trainer is not patched."""

    Parser.unpatched = staticmethod(unpatched)
    with_parser = types.ModuleType("argparse")
    vars(with_parser).update(vars(argparse), ArgumentParser=Parser)

    def wrapper(original: Original) -> Original:
        def parse_args(*args: Any, **kwargs: Any) -> Any:
            # The parser is created, filled and used inside the call, so the module is replaced during it.
            names, replaced = vars(module), vars(module)["argparse"]
            names["argparse"] = with_parser
            try:
                return original(*args, **kwargs)
            finally:
                names["argparse"] = replaced

        return parse_args

    return wrapper


def _loading(original: Original) -> Original:
    signature = inspect.signature(original)

    def pt_load(*args: Any, **kwargs: Any) -> Any:
        checkpoint = original(*args, **kwargs)
        path, *_ = signature.bind(*args, **kwargs).arguments.values()
        checkpoints.pick_up(path, checkpoint)
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
    if getattr(options, "torchcompile", False) and options.torchcompile_strategy in ("task", "step"):
        # The loss around the trainer's own is not compiled, and neither would be what it calls.
        given = {"backend": options.torchcompile_backend, "mode": options.torchcompile_mode}
        task.loss.compile(**{name: value for name, value in given.items() if value is not None})
    # A task adds up the keys that end in `_loss`, and logs the others.
    task.loss = build_loss(task.loss, options, sums_every_value=False)
    return task


def _train_one_epoch(original: Original, bound: inspect.BoundArguments) -> Any:
    from rankloss_open_clip.training import start_epoch

    given = bound.arguments
    # The state of open_clip's later trainer holds the task, and the task holds model and loss.
    state = given.get("state")
    loss = given["loss"] if state is None else getattr(state.task, "loss", None)
    epoch = given["epoch"] if state is None else state.epoch
    optimizer = (given if state is None else vars(state)).get("optimizer")
    start_epoch(loss, epoch, given["data"], given["args"], optimizer)
    companion = getattr(given["data"]["train"], _COMPANION, None)
    if companion is not None:
        split_features(given["model"] if state is None else state.task.trainable_module, companion)
    return original(*bound.args, **bound.kwargs)


def _get_csv_dataset(original: Original, bound: inspect.BoundArguments) -> Any:
    companion = _companion(bound)
    info = original(*bound.args, **bound.kwargs)
    if companion is not None:
        options = bound.arguments["args"]
        join_csv(info.dataloader.dataset, options.train_data, options.csv_separator, companion)
        setattr(info, _COMPANION, companion)
    return info


def _get_wds_dataset(original: Original, bound: inspect.BoundArguments) -> Any:
    companion = _companion(bound)
    if companion is None:
        return original(*bound.args, **bound.kwargs)
    # The pipeline is built inside the call, so the reader is replaced during it.
    names: dict[str, Any] = inspect.unwrap(original).__globals__
    read = names["tarfile_to_samples_nothrow"]
    text_key = getattr(bound.arguments["args"], "text_key", None) or "txt"
    names["tarfile_to_samples_nothrow"] = JoinedSamples(read, companion, text_key)
    try:
        info = original(*bound.args, **bound.kwargs)
    finally:
        names["tarfile_to_samples_nothrow"] = read
    setattr(info, _COMPANION, companion)
    return info


def _companion(bound: inspect.BoundArguments) -> Companion | None:
    """What comes with the texts of training data, once the call's tokenizer knows of it."""
    given = bound.arguments
    companion = command_line.companion_of(given["args"]) if given["is_train"] else None
    if companion is not None:
        given["tokenizer"] = JoinedTokenizer(given["tokenizer"], companion)
    return companion


_READERS = ("get_csv_dataset", "get_wds_dataset")
_WRAPPERS: dict[str, Callable[[Original], Original]] = {
    "create_loss": _with_loss(_create_loss),
    "create_task": _with_loss(_create_task),
    "train_one_epoch": _with_loss(_train_one_epoch),
    "get_csv_dataset": _with_loss(_get_csv_dataset),
    "get_wds_dataset": _with_loss(_get_wds_dataset),
    "pt_load": _loading,
}
