"""``rankloss doctor``: the installed trainers, and the reasons why one will not honour a loss."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
from dataclasses import dataclass

from rankloss._version import __version__


@dataclass(frozen=True)
class Trainer:
    """A trainer that there is a plug-in for.

    Attributes:
        name: The trainer, and rankloss's extra, whose range of versions is tested.
        distribution: Its distribution, as rankloss's requirements spell it.
        plugin: The module of the plug-in, ``module:function`` where a function returns the problems.
        use: The loss's way into it.
        needs: Packages without which it does not train, though it can be installed without them.
    """

    name: str
    distribution: str
    plugin: str
    use: str
    needs: tuple[str, ...] = ()


TRAINERS = (
    Trainer(
        "open-clip",
        "open-clip-torch",
        "rankloss_open_clip.bootstrap:problems",
        "python -m open_clip_train.main ... --loss rankclip; for a trainer laid out as before 2.26, "
        "python -m rankloss_open_clip --trainer training.main ... --loss rankclip",
    ),
    Trainer(
        "transformers",
        "transformers",
        "rankloss_trainers.transformers.trainer",
        "rankloss_trainers.transformers.ContrastiveTrainer(model, args, loss='rankclip'), or "
        "python -m rankloss_trainers.transformers SCRIPT ... --loss rankclip",
        ("accelerate",),
    ),
    Trainer(
        "sentence-transformers",
        "sentence-transformers",
        "rankloss_trainers.sentence_transformers",
        "loss = rankloss_trainers.sentence_transformers.ContrastiveLoss(model, 'rankclip'), and "
        "callbacks=[rankloss_trainers.sentence_transformers.Progress(loss)]",
        ("accelerate", "datasets"),
    ),
    Trainer(
        "lightning",
        "lightning",
        "rankloss_trainers.lightning",
        "rankloss_trainers.create('rankclip') in the module, and "
        "callbacks=[rankloss_trainers.lightning.Progress()]",
    ),
)
"""The trainers, in the order of the report."""


def main() -> int:
    """Print the report and return 0 if no installed trainer has a problem, else 1."""
    print(*machine(), sep="\n")
    healthy = True
    for trainer in TRAINERS:
        works, lines = examined(trainer)
        healthy &= works
        print(*lines, sep="\n")
    return 0 if healthy else 1


# --- trainers -------------------------------------------------------------------------------------------


def examined(trainer: Trainer) -> tuple[bool, list[str]]:
    """Examine a trainer: True if a loss will be honoured where it is installed, and the lines of the report.

    A trainer that is not installed has no problem, nor has one that others brought and that cannot train yet.
    """
    install = f"pip install 'rankloss[{trainer.name}]'"
    try:
        version = importlib.metadata.version(trainer.distribution)
    except importlib.metadata.PackageNotFoundError:
        return True, [f"{trainer.name}: not installed: {install}"]
    missing = [needed for needed in trainer.needs if importlib.util.find_spec(needed) is None]
    if missing:
        return True, [f"{trainer.name} {version}: not ready to train without {', '.join(missing)}: {install}"]
    wanted = rf"{trainer.distribution}(?:\[[^]]*\])?([^;]*); extra == ['\"]{trainer.name}['\"]"
    ranges = (re.match(wanted, line) for line in importlib.metadata.requires("rankloss") or [])
    shown = f"{trainer.name} {version} (tested with {next(found[1] for found in ranges if found)})"
    module, _, function = trainer.plugin.partition(":")
    try:
        loaded = importlib.import_module(module)
        problems: list[str] = getattr(loaded, function)() if function else []
    except Exception as error:  # whatever another package's import raises
        problems = [f"{module} cannot be imported: {type(error).__name__}: {error}"]
    if problems:
        return False, [f"{shown}: no", *(f"- {problem}" for problem in problems)]
    return True, [f"{shown}: yes, {trainer.use}"]


# --- the machine ------------------------------------------------------------------------


def machine() -> list[str]:
    """The versions of rankloss, Python, torch and Triton, the accelerators, and float32's precision."""
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    has_triton = importlib.util.find_spec("triton") is not None
    lines = [
        f"rankloss {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"Triton: {importlib.import_module('triton').__version__ if has_triton else 'not installed'}",
        f"CUDA {torch.version.cuda or torch.version.hip}: {', '.join(cards) or 'no GPU is found'}",
    ]
    precision = torch.get_float32_matmul_precision()  # some containers set it for every process
    if precision != "highest":
        lines.append(f"float32 products have the precision {precision!r} on a GPU: close ranks may change")
    return lines
