"""What keeps the unmodified ``python -m open_clip_train.main`` from honouring ``--loss``."""

from __future__ import annotations

import importlib
import importlib.util
import os

from rankloss_open_clip import bootstrap
from rankloss_trainers.import_hook import waits_for

_NOT_LOADED = (
    "torch loaded no plug-in, for {}: start the training with `python -m rankloss_open_clip` in place of "
    "`python -m open_clip_train.main`."
)
_TRAP = (
    "Without the plug-in the trainer takes `--loss rankclip` for an abbreviation of `--loss-dist-impl "
    "rankclip` and trains plain CLIP, without an error."
)


def missing_trainer() -> str:
    """Why the package ``open_clip_train`` is not there, and what to do; empty if it is."""
    if importlib.util.find_spec("open_clip_train") is not None:
        return ""
    return (
        "open_clip_train is not installed: pip install 'open_clip_torch[training]>=3.0', or for a trainer "
        "that is laid out as before 2.26, python -m rankloss_open_clip --trainer training.main"
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
    off = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"
    why = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps it from that" if off else "rankloss is not installed here"
    found = [] if waits_for(bootstrap.PARAMS) else [_NOT_LOADED.format(why)]
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
    return [*found, _TRAP] if found else []
