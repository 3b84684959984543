"""Which versions of open_clip ``--loss`` is tested with, and what the others are told."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Verdict:
    """Support status of a version of open_clip.

    Attributes:
        usable: Whether ``--loss`` may be tried with it at all.
        remark: The reason against it, or a warning; empty for a version that is tested.
    """

    usable: bool
    remark: str = ""


def judge(version: str) -> Verdict:
    """The support status of ``--loss`` with a version of open_clip.

    An untested version is tried, with a warning: :mod:`rankloss_open_clip.patches` refuses a trainer with an
    unknown layout, which its number does not tell.

    Args:
        version: What ``open_clip.__version__`` says.

    Example:
        >>> judge("3.3.0")
        Verdict(usable=True, remark='')
        >>> judge("2.20.0")
        Verdict(usable=False, remark='open_clip 2.20.0 is older than 2.26.1, the oldest that --loss is for')
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", version)
    release = tuple(int(number or 0) for number in match.groups()[:3]) if match else ()
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
        reason += "; its trainer is the package `training`, which is not patched"
    else:
        reason += ", but its trainer, open_clip_train, is not"
    return f"{reason}: {INSTALL}"


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
