"""Failures of the plug-in, and the runs that they stop. Every ``import torch`` runs this file."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

failures: dict[str, Exception] = {}
"""The errors, by the module that could not be patched; ``rankloss_open_clip`` if none could be waited for."""

MAINS = ("open_clip_train/main.py", "rankloss_open_clip/__main__.py")


def asks_for_loss(words: Sequence[str]) -> bool:
    """True if a command line has ``--loss``; the trainer's own parser reads it as ``--loss-dist-impl``."""
    return not {"--los", "--loss"}.isdisjoint(word.partition("=")[0] for word in words)


def raise_failures() -> None:
    """Raise an ImportError if a module could not be patched."""
    for name, error in failures.items():
        raise ImportError(_refusal(name, error)) from error


def report_no_hook(error: Exception) -> None:
    """Keep the error for which no module of the trainer can be patched.

    Raises:
        SystemExit: This process is the trainer, started with ``--loss``. Any other gets a warning, once.
    """
    name, is_known = "rankloss_open_clip", bool(failures)
    failures[name] = error
    program, *words = getattr(sys, "argv", None) or [""]
    if program.replace("\\", "/").endswith(MAINS) and asks_for_loss(words):
        sys.exit(f"error: {_refusal(name, error)}")
    if not is_known:
        import contextlib
        import warnings

        with contextlib.suppress(UserWarning):  # under -W error: `import torch` has to succeed
            text = f"rankloss is damaged: --loss will not work in open_clip's trainer ({error!r})"
            warnings.warn(text, stacklevel=1)


def _refusal(name: str, error: Exception) -> str:
    return (
        "--loss was given, but rankloss_open_clip could not attach to open_clip's trainer "
        f"({name}: {error!r}). Run `rankloss doctor` for advice, or leave --loss away."
    )
