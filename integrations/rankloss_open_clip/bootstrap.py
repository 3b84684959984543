"""Called by torch when it is imported: waits for open_clip's trainer, and patches it once it is loaded.

torch loads the entry points of the group ``torch.backends`` each time it is imported, in every program of the
environment. This module therefore imports the standard library only, does next to nothing, and never raises.
:func:`attach` waits for the modules named in :data:`SEAMS` (:mod:`rankloss_trainers.import_hook`), and
:mod:`rankloss_open_clip.patches` patches each after it has been executed.

A patch that fails must not stop a run that did not ask for it, and must not let a run that did ask train
something else: the trainer's parser would take ``--loss rankclip`` for an abbreviation of
``--loss-dist-impl`` and train plain CLIP. So failures are kept in :data:`failures`, and ``parse_args``,
patched or guarded, raises when the command line asks for a loss.
"""

from __future__ import annotations

import sys

from rankloss_open_clip.failures import failures, raise_failures

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


def attach() -> None:
    """Patch the modules that are loaded, and the others once they are. Safe to call twice; never raises."""
    try:
        from rankloss_trainers.import_hook import after_import, waits_for

        if not waits_for(PARAMS):
            after_import(dict.fromkeys(SEAMS, patch))
    except Exception as error:
        failures["rankloss_open_clip"] = error


def patch(module: ModuleType) -> None:
    """Patch a loaded module of :data:`SEAMS`, and keep an error instead of raising it."""
    try:
        from rankloss_open_clip import patches

        patches.patch(module)
    except Exception as error:
        failures[module.__name__] = error
        if module.__name__ == PARAMS and hasattr(module, "parse_args"):
            _guard(module)


def problems() -> list[str]:
    """Import the trainer, and list the reasons why it would not honour ``--loss``."""
    import importlib

    from rankloss_trainers.import_hook import waits_for

    importlib.import_module("open_clip_train.main")
    off = "torch loaded no plug-in (TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps it from that), so `--loss rankclip`"
    off += " means `--loss-dist-impl rankclip`, and plain CLIP: start with `python -m rankloss_open_clip`"
    found = [] if waits_for(PARAMS) else [off]
    return found + [f"{name} could not be patched: {error!r}" for name, error in failures.items()]


def _guard(module: Any) -> None:
    """Let the ``parse_args`` of a trainer that could not be patched refuse ``--loss``."""
    original = module.parse_args

    def parse_args(argv: Any = None) -> Any:
        given = sys.argv[1:] if argv is None else argv
        # The trainer's own parser reads both as --loss-dist-impl.
        if {"--los", "--loss"} & {word.partition("=")[0] for word in given}:
            raise_failures()
        return original(argv)

    module.parse_args = parse_args
