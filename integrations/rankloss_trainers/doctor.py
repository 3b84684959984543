"""``rankloss doctor``: which trainers here will honour a loss of the catalogue, and what would compute it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trainer:
    """A trainer that there is a plug-in for.

    Attributes:
        name: What it is called.
        distributions: The distributions that it may come from.
        extra: rankloss's extra, whose range of versions is what is tested.
        plugin: The module of the plug-in, ``module:function`` where a function returns the problems.
        use: How a loss gets into it.
        needs: Distributions without which it does not train, though it can be installed without them.
    """

    name: str
    distributions: tuple[str, ...]
    extra: str
    plugin: str
    use: str
    needs: tuple[str, ...] = ()


TRAINERS = (
    Trainer(
        "open_clip",
        ("open_clip_torch",),
        "open-clip",
        "rankloss_open_clip.diagnosis:problems",
        "python -m open_clip_train.main ... --loss rankclip; for a trainer laid out as before 2.26, "
        "python -m rankloss_open_clip --trainer training.main ... --loss rankclip",
    ),
    Trainer(
        "transformers",
        ("transformers",),
        "transformers",
        "rankloss_trainers.transformers.trainer",
        "rankloss_trainers.transformers.ContrastiveTrainer(model, args, loss='rankclip'), or "
        "python -m rankloss_trainers.transformers SCRIPT ... --loss rankclip",
        ("accelerate",),
    ),
    Trainer(
        "sentence-transformers",
        ("sentence-transformers",),
        "sentence-transformers",
        "rankloss_trainers.sentence_transformers",
        "loss = rankloss_trainers.sentence_transformers.RankClipLoss(model), and "
        "callbacks=[rankloss_trainers.sentence_transformers.Progress(loss)]",
        ("accelerate", "datasets"),
    ),
    Trainer(
        "Lightning",
        ("lightning", "pytorch-lightning"),
        "lightning",
        "rankloss_trainers.lightning",
        "rankloss.RankClipLoss() in the module, and callbacks=[rankloss_trainers.lightning.Progress()]",
    ),
)
"""The trainers, in the order of the report."""


def main() -> int:
    """Print the report and return 0 if no installed trainer has a problem, else 1."""
    try:
        importlib.import_module("torch")
    except Exception as error:  # a broken installation raises all kinds
        print(f"torch cannot be imported: {type(error).__name__}: {error}")
        return 1
    for line in machine():
        print(line)
    healthy = True
    for trainer in TRAINERS:
        works, lines = examined(trainer)
        healthy &= works
        for line in lines:
            print(line)
    return 0 if healthy else 1


# --- trainers -------------------------------------------------------------------------------------------


def examined(trainer: Trainer) -> tuple[bool, list[str]]:
    """Whether an installed trainer will honour a loss, and what to print of it.

    A trainer that is not installed has no problem, nor has one that others brought and that cannot train yet.
    """
    found = {name: version for name in trainer.distributions if (version := _version(name))}
    install = f"pip install 'rankloss[{trainer.extra}]'"
    if not found:
        return True, [f"{trainer.name}: not installed: {install}"]
    name, version = next(iter(found.items()))
    missing = [needed for needed in trainer.needs if not _version(needed)]
    if missing:
        return True, [f"{trainer.name} {version}: not ready to train without {', '.join(missing)}: {install}"]
    tested = _range_of(trainer.extra, name)
    shown = f"{trainer.name} {version}{f' (tested with {tested})' if tested else ''}"
    problems = _problems(trainer.plugin)
    if problems:
        return False, [f"{shown}: no", *(f"- {problem}" for problem in problems)]
    return True, [f"{shown}: yes, {trainer.use}"]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _problems(plugin: str) -> list[str]:
    module, _, function = plugin.partition(":")
    try:
        loaded = importlib.import_module(module)
        diagnose: Callable[[], list[str]] = getattr(loaded, function) if function else list
        return diagnose()
    except Exception as error:  # whatever another package's import raises
        return [f"{module} cannot be imported: {type(error).__name__}: {error}"]


def _range_of(extra: str, distribution: str) -> str:
    """The range of versions that an extra of rankloss asks for; empty if it does not say."""
    for requirement in importlib.metadata.requires("rankloss") or []:
        wanted, _, marker = requirement.partition(";")
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(.*)", wanted.strip())
        same = match and re.sub(r"[-_.]+", "-", match[1]) == re.sub(r"[-_.]+", "-", distribution)
        if match and same and re.search(rf"extra == ['\"]{extra}['\"]", marker):
            return ",".join(sorted(match[2].replace(" ", "").split(","), reverse=True))
    return ""


# --- the machine ------------------------------------------------------------------------


def machine() -> list[str]:
    """rankloss, Python, torch, accelerator, Triton, the kernel that would run, and float32's precision."""
    import torch

    import rankloss
    from rankloss.kernels.rows import triton_version

    lines = [
        f"rankloss {rankloss.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"Triton: {triton_version() or 'not installed'}",
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        lines += [f"{name}: {torch.cuda.get_device_name(name)}" for name in devices]
    else:
        built = torch.version.cuda or torch.version.hip
        lines.append(f"CUDA: {f'torch is built for {built}, but no GPU is found' if built else 'none'}")
    plan: Any = rankloss.RankConsistency().plan(4096, devices[0])
    why = f" ({plan.why_no_kernel})" if plan.why_no_kernel else ""
    lines.append(f"kernel for 4,096 pairs on {devices[0]}: {plan.kernel}{why}")
    precision = torch.get_float32_matmul_precision()  # some containers set it for every process
    if precision != "highest":
        lines.append(f"float32 products have the precision {precision!r} on a GPU: close ranks may change")
    return lines
