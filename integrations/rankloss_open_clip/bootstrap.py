"""Called by torch when it is imported: waits for open_clip's trainer, and patches it once it is loaded.

torch loads the entry points of the group ``torch.backends`` each time it is imported, in every program of the
environment. This module therefore imports the standard library only, does next to nothing, and never raises.
:func:`attach` waits for the modules named in :data:`SEAMS` (:mod:`rankloss_trainers.import_hook`), and
:mod:`rankloss_open_clip.patches` patches each after it has been executed.

A patch that fails must not stop a run that did not ask for it, and must not let a run that did ask train
something else: the trainer's parser would take ``--loss rankclip`` for an abbreviation of
``--loss-dist-impl`` and train plain CLIP. So failures are kept in :data:`failures`, and a guard around the
trainer's ``parse_args``, which does not need the patches, raises when the command line asks for a loss.
"""

from __future__ import annotations

import sys

# Other imports are inside the functions that need them, since every `import torch` runs this module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

PARAMS = "open_clip_train.params"
"""The module of the trainer's parser."""

SEAMS = (
    "open_clip.factory",
    PARAMS,
    "open_clip_train.train",
    "open_clip_train.legacy_train",
    "open_clip_train.data",
    "open_clip_train.file_utils",
)
"""The modules to patch; open_clip 3.x has no ``legacy_train``."""

failures: dict[str, Exception] = {}
"""Modules that were loaded but could not be patched, with what went wrong."""


def attach() -> None:
    """Patch what is loaded already, and the rest once it is. Safe to call twice; never raises."""
    try:
        from rankloss_trainers.import_hook import after_import, waits_for

        if not waits_for(PARAMS):
            after_import(dict.fromkeys(SEAMS, patch))
    except Exception as error:
        failures["rankloss_open_clip"] = error


def patch(module: ModuleType) -> None:
    """Patch a loaded module of :data:`SEAMS`, and keep what went wrong instead of raising it."""
    try:
        from rankloss_open_clip import patches

        patches.patch(module)
    except Exception as error:
        failures[module.__name__] = error
    if module.__name__ == PARAMS and hasattr(module, "parse_args"):
        _guard(module)


def _guard(module: Any) -> None:
    """Let the trainer's ``parse_args`` refuse ``--loss`` when a patch failed."""
    import functools

    original = module.parse_args

    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        if failures:
            _report(next(iter((*args, *kwargs.values())), None))
        return original(*args, **kwargs)

    module.parse_args = parse_args


def _report(argv: Any) -> None:
    reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures.items())
    given = sys.argv[1:] if argv is None else argv
    # The trainer's own parser reads both as --loss-dist-impl; the options of a loss it does not know.
    if {"--los", "--loss"} & {str(argument).partition("=")[0] for argument in given}:
        raise ImportError(
            f"--loss was given, but rankloss_open_clip could not attach to open_clip's trainer ({reasons}). "
            "Run `rankloss doctor` for advice, or leave --loss away to train without it."
        ) from next(iter(failures.values()))
    import logging

    logging.getLogger("rankloss_open_clip").warning(
        "--loss is not available in this run: rankloss_open_clip could not attach (%s)", reasons
    )
