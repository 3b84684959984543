"""What keeps the unmodified ``python -m open_clip_train.main`` from honouring ``--loss``."""

from __future__ import annotations

import importlib
import importlib.util
import os

from rankloss_open_clip import bootstrap
from rankloss_open_clip.versions import missing_trainer

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_RUNNER = (
    "start the training with `python -m rankloss_open_clip` in place of `python -m open_clip_train.main`"
)
_TRAP = (
    "Without the plug-in the trainer takes `--loss rankclip` for an abbreviation of `--loss-dist-impl "
    "rankclip` and trains plain CLIP, without an error."
)


def problems() -> list[str]:
    """Import what the trainer imports, and say what is wrong; the cause comes first.

    Returns:
        A sentence or two per problem; empty if ``--loss`` will be honoured.
    """
    missing = missing_trainer()
    if missing:
        return [f"{missing}."]
    importlib.import_module("torch")
    found = [] if bootstrap.attached() else [_why_not_loaded()]
    for name in (*bootstrap.SEAMS, "rankloss_open_clip.training"):
        try:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        except Exception as error:
            found.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
    found += [
        f"{name} could not be patched: {type(error).__name__}: {error}"
        for name, error in bootstrap.failures.items()
    ]
    if not found:
        from rankloss_open_clip import patches

        found += [f"{name} is not patched: another import hook loads it first." for name in patches.missed()]
    return [*found, _TRAP] if found else []


def _why_not_loaded() -> str:
    if os.environ.get(_AUTOLOAD) == "0":
        return f"{_AUTOLOAD}=0 keeps torch from loading plug-ins. Unset it, or {_RUNNER}."
    return f"torch loaded no plug-in, for rankloss is not installed here. Install it, or {_RUNNER}."
