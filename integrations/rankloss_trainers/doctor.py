"""``rankloss doctor``: the installed trainers, and the reasons why one will not honour a loss."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from typing import NamedTuple

from rankloss._version import __version__


class Trainer(NamedTuple):
    """A trainer with a plug-in.

    Attributes:
        name: The trainer, and rankloss's extra, whose range of versions is tested.
        distribution: Its distribution, as rankloss's requirements spell it.
        plugin: The module of the plug-in, ``module:function`` where a function returns the problems.
        use: The loss's way into it.
    """

    name: str
    distribution: str
    plugin: str
    use: str


TRAINERS = [
    Trainer(
        name="open-clip",
        distribution="open-clip-torch",
        plugin="rankloss_open_clip.bootstrap:problems",
        use="python -m open_clip_train.main ... --loss rankclip",
    ),
    Trainer(
        name="transformers",
        distribution="transformers",
        plugin="rankloss_trainers.transformers.trainer",
        use="python -m rankloss_trainers.transformers SCRIPT ... --loss rankclip, or "
        "ContrastiveTrainer(loss='rankclip')",
    ),
    Trainer(
        name="sentence-transformers",
        distribution="sentence-transformers",
        plugin="rankloss_trainers.sentence_transformers",
        use="loss = ContrastiveLoss(model, 'rankclip'), and callbacks=[Progress(loss)]",
    ),
    Trainer(
        name="lightning",
        distribution="lightning",
        plugin="rankloss_trainers.lightning",
        use="rankloss_trainers.create('rankclip') in the module, and callbacks=[Progress()]",
    ),
]
"""The trainers, in the order of the report."""


def main() -> int:
    """Print the report and return 0 if a trainer is ready and none has a problem, else 1."""
    print(*machine(), sep="\n")
    reports = [examined(trainer) for trainer in TRAINERS]
    for _, lines in reports:
        print(*lines, sep="\n")
    states = [state for state, _ in reports]
    is_one_ready, has_one_problems = True in states, False in states
    if has_one_problems and not is_one_ready:
        print("No trainer is ready: see the problems above.")
    elif not is_one_ready:
        print("No trainer is ready. Install one, for instance: pip install 'rankloss[open-clip]'")
    return 0 if is_one_ready and not has_one_problems else 1


def examined(trainer: Trainer) -> tuple[bool | None, list[str]]:
    """Examine a trainer: True if it will honour a loss, False if it will not; and the lines of the report.

    None if it is not installed, or lacks packages to train: others may have brought it.
    """
    try:
        version = importlib.metadata.version(trainer.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, [f"{trainer.name}: not installed: pip install 'rankloss[{trainer.name}]'"]
    shown = f"{trainer.name} {version} (tested with {_tested(trainer)})"
    module, _, function = trainer.plugin.partition(":")
    try:
        loaded = importlib.import_module(module)
        problems: list[str] = getattr(loaded, function)() if function else []
    except ModuleNotFoundError as error:
        return None, [f"{shown}: not ready to train: {error}"]
    except Exception as error:  # of any other package's import
        problems = [f"{module} cannot be imported: {type(error).__name__}: {error}"]
    if problems:
        return False, [f"{shown}: no", *(f"- {problem}" for problem in problems)]
    return True, [f"{shown}: yes, {trainer.use}"]


def _tested(trainer: Trainer) -> str:
    """The range of versions that the extra of a trainer asks for; a LookupError if it asks for none."""
    from packaging.requirements import Requirement  # every trainer brings it

    try:
        requirements = importlib.metadata.requires("rankloss") or []
    except importlib.metadata.PackageNotFoundError:
        return "unknown versions: rankloss is imported from its source, and not installed"
    for text in requirements:
        requirement = Requirement(text)
        is_of_trainer = requirement.name.replace("_", "-") == trainer.distribution
        marker = requirement.marker
        if is_of_trainer and marker is not None and marker.evaluate({"extra": trainer.name}):
            return str(requirement.specifier)
    raise LookupError(f"no extra {trainer.name} of rankloss asks for {trainer.distribution}")


def machine() -> list[str]:
    """The versions of rankloss, Python, torch and Triton, the accelerators, and float32's precision."""
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    has_triton = importlib.util.find_spec("triton") is not None
    if torch.version.cuda:
        toolkit = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        toolkit = f"ROCm {torch.version.hip}"
    else:
        toolkit = "torch without CUDA"
    return [
        f"rankloss {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"Triton: {'installed' if has_triton else 'not installed'}",
        f"{toolkit}: {', '.join(cards) or 'no GPU is found'}",
        f"precision of float32 products on a GPU: {torch.get_float32_matmul_precision()}",
    ]
