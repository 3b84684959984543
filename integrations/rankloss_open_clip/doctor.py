"""``python -m rankloss_open_clip.doctor``: will ``--loss rankclip`` be honoured here, and if not, why?

The exit code is 0 if the unmodified ``python -m open_clip_train.main`` will honour it, else 1. torch and the
trainer's modules are imported, as the trainer would, and inspected. A version only adds a remark, or rules
out what is too old.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys

from rankloss_open_clip import bootstrap
from rankloss_open_clip.versions import INSTALL, judge, missing_trainer
from rankloss_trainers import catalog
from rankloss_trainers.console import readers_may_leave

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_OPTIONAL = ("open_clip_train.legacy_train",)  # open_clip 3.x has no such module
_RUNNER = (
    "start the training with `python -m rankloss_open_clip` in place of `python -m open_clip_train.main`"
)
_TRAP = (
    "Without the plug-in the trainer takes `--loss rankclip` for an abbreviation of `--loss-dist-impl "
    "rankclip` and trains plain CLIP, without an error."
)


def diagnose() -> list[str]:
    """Import what the trainer imports, and collect what keeps ``--loss`` from being honoured.

    Returns:
        One sentence or two per problem, the cause first; empty if there is none.
    """
    if importlib.util.find_spec("torch") is None:
        return ["torch is not installed: pip install torch."]
    missing = missing_trainer()
    if missing:
        return [f"{missing}."]
    problems = []
    try:
        importlib.import_module("torch")
    except Exception as error:
        return [f"`import torch` fails: {type(error).__name__}: {error}"]
    if not bootstrap.attached():
        problems.append(_why_not_loaded())
    for name in bootstrap.SEAMS:
        try:
            importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name and name in _OPTIONAL:
                continue
            problems.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
    problems += [
        f"{name} could not be patched: {type(error).__name__}: {error}"
        for name, error in bootstrap.failures.items()
    ]
    if not problems:
        problems += _unpatched()
    verdict = judge(_version("open_clip"))
    if not verdict.usable:
        problems.append(f"{verdict.remark}: {INSTALL}.")
    try:
        importlib.import_module("rankloss_open_clip.training")
    except Exception as error:
        problems.append(f"the ranking loss cannot be imported: {type(error).__name__}: {error}")
    return problems


@readers_may_leave()
def main() -> int:
    """Print the answer in plain words and return the exit code."""
    problems = diagnose()
    for name in ("rankloss", "torch", "open_clip"):
        print(f"{name} {_version(name)}")
    if not problems:
        print("Yes: `python -m open_clip_train.main ... --loss rankclip` will be honoured here.")
        remark = judge(_version("open_clip")).remark
        if remark:
            print(f"But {remark}.")
        for sentence in _other_packages():
            print(sentence)
        return 0
    print("No: `python -m open_clip_train.main ... --loss rankclip` will not be honoured here.")
    for problem in problems:
        print(f"- {problem}")
    if "open_clip_train" in sys.modules:
        print(_TRAP)
    return 1


def _why_not_loaded() -> str:
    if os.environ.get(_AUTOLOAD) == "0":
        return f"{_AUTOLOAD}=0 keeps torch from loading plug-ins. Unset it, or {_RUNNER}."
    if not hasattr(sys.modules["torch"], "_import_device_backends"):
        return (
            f"torch {_version('torch')} loads no plug-ins, 2.5 is the first that does. Upgrade, or {_RUNNER}."
        )
    entries = importlib.metadata.entry_points(group="torch.backends")
    if not any(entry.value == "rankloss_open_clip.bootstrap:attach" for entry in entries):
        return f"rankloss is not installed here: its entry point is not registered. Install it, or {_RUNNER}."
    return f"torch did not load the plug-in, though it is registered. To go on, {_RUNNER}."


def _unpatched() -> list[str]:
    from rankloss_open_clip import patches

    return [f"{name} is not patched: another import hook loads it first." for name in patches.unpatched()]


def _other_packages() -> list[str]:
    """The losses that other packages register, and whether each can be used."""
    sentences = [f"{sentence}." for sentence in catalog.shadowed()]
    for name, candidate in catalog.candidates().items():
        if candidate.package:
            try:
                candidate.load()
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                sentences.append(f"--loss {name} ({candidate.package}) cannot be used: {fault}.")
            else:
                sentences.append(f"--loss {name} ({candidate.package}) can be used as well.")
    return sentences


def _version(module: str) -> str:
    # Of the imported module: a source checkout on the path may shadow the installed package.
    return getattr(sys.modules.get(module), "__version__", "not loaded")


if __name__ == "__main__":
    sys.exit(main())
