"""Which versions of open_clip ``--loss`` is tested with, and what the others are told."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

INSTALL = "pip install 'open_clip_torch[training]>=3.0'"
"""The command that installs a supported trainer."""

OLDEST = (2, 26, 1)
"""The first release whose trainer is the package ``open_clip_train``."""

LOWEST, NEWEST = (3, 0, 0), (3, 3, 0)
"""The releases that the test matrix runs."""

ATTACHED = ((2, 16, 1), (2, 24, 0))
"""The releases before :data:`OLDEST` with which an attached trainer is tested."""


@dataclass(frozen=True)
class Verdict:
    """Support status of a version of open_clip.

    Attributes:
        usable: Whether ``--loss`` may be tried with it at all.
        remark: The reason against it, or a warning; empty for a version that is tested.
    """

    usable: bool
    remark: str = ""


def judge(version: str, *, attached: bool = False) -> Verdict:
    """The support status of ``--loss`` with a version of open_clip.

    An untested version is tried, with a warning: :mod:`rankloss_open_clip.patches` refuses a trainer with an
    unknown layout, which its number does not tell.

    Args:
        version: What ``open_clip.__version__`` says.
        attached: Whether ``--loss`` was attached to a trainer whose layout was recognised, see
            :func:`rankloss_open_clip.patches.patch_trainer`.

    Example:
        >>> judge("3.3.0")
        Verdict(usable=True, remark='')
        >>> judge("2.20.0")
        Verdict(usable=False, remark='open_clip 2.20.0 is older than 2.26.1, the oldest that --loss is for')
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", version)
    release = tuple(int(number or 0) for number in match.groups()[:3]) if match else ()
    if match and attached and release < OLDEST:
        tested = " and ".join(map(_text, ATTACHED))
        return Verdict(
            True,
            ""
            if release in ATTACHED
            else f"open_clip {version}: an attached trainer is tested with {tested}, and tried with this",
        )
    if match and release < OLDEST:
        return Verdict(
            False, f"open_clip {version} is older than {_text(OLDEST)}, the oldest that --loss is for"
        )
    # A development version has no test matrix, even if its number is that of a tested release.
    if match and LOWEST <= release <= NEWEST and not re.search(r"dev|a|b|rc", match[4].partition("+")[0]):
        return Verdict(True)
    return Verdict(
        True,
        f"open_clip {version}: --loss is tested with {_text(LOWEST)} to {_text(NEWEST)}, and tried with this",
    )


def imported() -> str:
    """The version of open_clip that this process imports: a fork may stand before the installed package."""
    for name in ("open_clip", "open_clip.version"):  # early releases have it in the second only
        try:
            return str(importlib.import_module(name).__version__)
        except (ImportError, AttributeError):
            continue
    return "of unknown version"


def missing_trainer() -> str:
    """Why the package ``open_clip_train`` is not there, and what to do; empty if it is."""
    if importlib.util.find_spec("open_clip_train") is not None:
        return ""
    if importlib.util.find_spec("open_clip") is None:
        return f"open_clip_train is not installed: {INSTALL}"
    try:
        version = importlib.metadata.version("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    reason = judge(version).remark if not judge(version).usable else f"open_clip {version} is installed"
    if importlib.util.find_spec("training") is not None:
        reason += "; its trainer is the package `training`, which has to be named"
        return f"{reason}: python -m rankloss_open_clip --trainer training.main"
    else:
        reason += ", but its trainer, open_clip_train, is not"
    return f"{reason}: {INSTALL}"


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
