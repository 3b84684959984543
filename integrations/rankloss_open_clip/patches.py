"""The patches that are applied to open_clip's modules after they are loaded.

Each wraps functions by name, once, and keeps their name, signature and source visible. None of them changes a
run without ``--loss``. In a run with it functions of :mod:`rankloss_open_clip.training` are called, a module
that imports open_clip itself, and is imported by the first call that needs it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rankloss_open_clip.arguments import parsed, requested, usage_errors

Original = Callable[..., Any]
Wrapper = Callable[[Original], Original]


def patch(module: ModuleType) -> None:
    """Patch one of the modules that :mod:`rankloss_open_clip.bootstrap` waits for.

    Args:
        module: The module.

    Raises:
        AttributeError: No function is there to patch.
        TypeError: A function has other parameters than in open_clip's trainer.
    """
    wrapped = _wrapped(vars(module), _WRAPPERS)
    if not wrapped:
        raise AttributeError(f"{module.__name__} has none of {', '.join(_WRAPPERS)}")
    vars(module).update(wrapped)


def patch_trainer(module: ModuleType, create_loss: str) -> None:
    """Patch the main module of a trainer, and the module of its data: both, or none if an error is raised.

    For the arguments and the errors see :func:`rankloss_open_clip.attach`.
    """
    for name in (create_loss, "parse_args", "train_one_epoch"):
        if not callable(getattr(module, name, None)):
            raise AttributeError(f"{module.__name__} has no function {name}")
    namespaces = [(vars(module), {**_WRAPPERS, create_loss: _WRAPPERS["create_loss"]})]
    if hasattr(module, "get_data"):  # beside which are the functions that read the data
        namespaces.append((inspect.unwrap(module.get_data).__globals__, _WRAPPERS))
    wrapped = [_wrapped(names, wrappers) for names, wrappers in namespaces]  # raises before any is replaced
    for (names, _), functions in zip(namespaces, wrapped, strict=True):
        names.update(functions)


# --- wrapping -------------------------------------------------------------------------------------------

_PATCHED = "_rankloss_open_clip_patched"


def _wrapped(names: Mapping[str, Any], wrappers: Mapping[str, Wrapper]) -> dict[str, Any]:
    """The functions of a module's namespace that have a wrapper, each wrapped once, by their names."""
    functions = {name: names[name] for name in wrappers if name in names}
    for name, original in functions.items():
        # The mark sits on the function, not on the module: a reloaded module has new functions to patch.
        if not getattr(original, _PATCHED, False):
            functions[name] = functools.wraps(original)(wrappers[name](original))
            setattr(functions[name], _PATCHED, True)
    return functions


def _with_loss(replacement: str, *layouts: set[str]) -> Wrapper:
    """A wrapper that calls a function of ``training`` in place of the original, in a run with ``--loss``.

    Args:
        replacement: The name of the function of ``training``, which takes the original and the bound
            arguments.
        *layouts: Sets of parameters, one for each generation of trainers; the original has all of one set,
            or is refused.
    """

    def wrapper(original: Original) -> Original:
        signature = inspect.signature(original)
        is_known = any(layout <= signature.parameters.keys() for layout in layouts)
        if not is_known:
            raise TypeError(f"{original.__module__}.{original.__name__} has unknown parameters: {signature}")

        def call(*args: Any, **kwargs: Any) -> Any:
            """Call the original without ``--loss``, the replacement with it."""
            bound = signature.bind(*args, **kwargs)
            if requested(bound.arguments["args"]) is None:
                return original(*args, **kwargs)
            return getattr(_training(), replacement)(original, bound)

        return call

    return wrapper


def _parsing(original: Original) -> Original:
    """Let ``parse_args`` take the options of losses too, and start the run that they ask for."""

    def parse_args(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        argv = values[0] if values else None  # its first argument, by whatever name
        arguments, choice = parsed(original, sys.argv[1:] if argv is None else argv)
        if choice is not None:
            with usage_errors():
                arguments.rankloss_run = _training().start(arguments, choice)
        return arguments

    return parse_args


def _training() -> Any:
    """The module of a run with ``--loss``, which imports open_clip."""
    return importlib.import_module("rankloss_open_clip.training")


_WRAPPERS: dict[str, Wrapper] = {
    "create_loss": _with_loss("create_loss", {"args"}),
    "create_task": _with_loss("create_task", {"args"}),
    "train_one_epoch": _with_loss(
        "train_one_epoch", {"data", "args", "loss", "epoch"}, {"data", "args", "state"}
    ),
    "get_csv_dataset": _with_loss("get_dataset", {"args", "is_train", "tokenizer"}),
    "get_wds_dataset": _with_loss("get_dataset", {"args", "is_train", "tokenizer"}),
    "parse_args": _parsing,
}
