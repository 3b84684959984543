"""Waits for open_clip's trainer, patches its modules once they are loaded, and keeps what failed.

torch loads the entry points of the group ``torch.backends`` each time it is imported, in every program of the
environment: :func:`rankloss_open_clip.wait_for_trainer`, which calls :func:`attach`. This module therefore
imports the standard library only and does next to nothing. :func:`attach` waits for the modules named in
:data:`SEAMS` (:mod:`rankloss_trainers.import_hook`), and :mod:`rankloss_open_clip.patches` patches each after
it has been executed.

A patch that fails must not stop a run that did not ask for it, and must not let a run that did ask train
something else. So failures are kept in :data:`rankloss_open_clip.failures`, and ``parse_args``, patched or
guarded, raises when the command line asks for a loss.
"""

from __future__ import annotations

import sys

import rankloss_open_clip
from rankloss_open_clip import asks_for_loss, raise_failures, report_damage

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
)
"""The modules to patch; open_clip 3.x has no ``legacy_train``."""


def problems() -> list[str]:
    """Import the trainer, and list the reasons why it would not honour ``--loss``."""
    import importlib
    import os

    importlib.import_module("open_clip_train.main")
    if failures := rankloss_open_clip.failures:
        return [f"{name} could not be patched: {error!r}" for name, error in failures.items()]
    from rankloss_trainers.import_hook import waits_for

    if waits_for(PARAMS):  # torch has loaded the plug-in
        return []
    switch = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    return [
        f"torch loaded no plug-in ({switch} is {os.environ.get(switch)!r}; it has to be 1 or unset), so "
        "`--loss rankclip` means `--loss-dist-impl rankclip`, and plain CLIP: start with "
        "`python -m rankloss_open_clip`"
    ]


def patch(module: ModuleType) -> None:
    """Patch a loaded module of :data:`SEAMS`, and keep an error instead of raising it.

    The parser of a trainer that could not be patched refuses ``--loss``.
    """
    try:
        _patch_or_raise(module)
    except Exception as error:
        rankloss_open_clip.failures[module.__name__] = error
        if module.__name__ == PARAMS and hasattr(module, "parse_args"):
            _guard(module)


def _patch_or_raise(module: ModuleType) -> None:
    """Patch a loaded module of :data:`SEAMS`, and raise any error."""
    try:
        from rankloss_open_clip.patches import patch as patch_functions
    except Exception as error:
        report_damage(error)
        raise
    patch_functions(module)
    # Asked of the function itself: a damaged patches.py may do nothing, and raise nothing.
    if module.__name__ == PARAMS and not hasattr(module.parse_args, "__wrapped__"):
        raise AttributeError("parse_args is not patched")


def _guard(module: Any) -> None:
    """Let the ``parse_args`` of a trainer that could not be patched refuse ``--loss``."""
    original = module.parse_args

    def parse_args(argv: Any = None) -> Any:
        words = sys.argv[1:] if argv is None else argv
        if asks_for_loss(words):
            raise_failures()
        return original(argv)

    module.parse_args = parse_args


def attach() -> None:
    """Patch the modules that are loaded, and the others once they are. Safe to call twice.

    Raises:
        SystemExit: The modules cannot be waited for, and this process is the trainer, started with
            ``--loss``.
    """
    try:
        from rankloss_trainers.import_hook import after_import, waits_for

        if not waits_for(PARAMS):
            after_import(dict.fromkeys(SEAMS, patch))
    except Exception as error:
        report_damage(error)
