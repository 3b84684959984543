"""``rankloss doctor``: which trainers here will honour a loss of the catalogue, and what would compute it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Trainer:
    """A trainer that there is a plug-in for.

    Attributes:
        name: What it is called, and with it rankloss's extra, whose range of versions is what is tested.
        distribution: The distribution that it comes from, as rankloss's requirements spell it.
        plugin: The module of the plug-in, ``module:function`` where a function returns the problems.
        use: How a loss gets into it.
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
        "rankloss_open_clip.diagnosis:problems",
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
        "loss = rankloss_trainers.sentence_transformers.RankClipLoss(model), and "
        "callbacks=[rankloss_trainers.sentence_transformers.Progress(loss)]",
        ("accelerate", "datasets"),
    ),
    Trainer(
        "lightning",
        "lightning",
        "rankloss_trainers.lightning",
        "rankloss.RankClipLoss() in the module, and callbacks=[rankloss_trainers.lightning.Progress()]",
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
    """Whether an installed trainer will honour a loss, and what to print of it.

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
    """rankloss, Python, torch, accelerators, Triton, whether its kernels serve, and float32's precision."""
    import torch

    import rankloss
    from rankloss_triton import why_not
    from rankloss_triton.launching import triton_version

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = "cuda:0" if cards else "cpu"
    reason = why_not(rankloss.RankOptions(), torch.device(device), torch.float32, 4096, 4096)
    lines = [
        f"rankloss {rankloss.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"Triton: {triton_version() or 'not installed'}",
        f"CUDA {torch.version.cuda or torch.version.hip}: {', '.join(cards) or 'no GPU is found'}",
        f"kernel='triton' on {device}: {'no: ' + reason if reason else 'serves'}",
    ]
    precision = torch.get_float32_matmul_precision()  # some containers set it for every process
    if precision != "highest":
        lines.append(f"float32 products have the precision {precision!r} on a GPU: close ranks may change")
    return lines
