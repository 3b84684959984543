"""Which versions of open_clip ``--loss`` is tested with, and what to do without a trainer."""

from __future__ import annotations

import importlib
import importlib.util
import re

INSTALL = "pip install 'open_clip_torch[training]>=3.0'"
"""The command that installs a supported trainer."""

LOWEST, NEWEST = (3, 0, 0), (3, 3, 0)
"""The releases that the test matrix runs."""

ATTACHED = ((2, 16, 1), (2, 24, 0))
"""The releases before ``open_clip_train`` with which an attached trainer is tested."""


def remark(version: str) -> str:
    """What a run's log says of a version of open_clip; empty for one that is tested.

    An untested version is tried: :mod:`rankloss_open_clip.patches` refuses a trainer with an unknown layout,
    which its number does not tell.

    Args:
        version: What ``open_clip.__version__`` says.

    Example:
        >>> remark("3.3.0")
        ''
        >>> remark("2.32.0")
        'open_clip 2.32.0: --loss is tested with 3.0.0 to 3.3.0, and tried with this'
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", version)
    release = tuple(int(number or 0) for number in match.groups()[:3]) if match else ()
    # A development version has no test matrix, even if its number is that of a tested release.
    final = match is not None and not re.search(r"dev|a|b|rc", match[4].partition("+")[0])
    if final and (release in ATTACHED or LOWEST <= release <= NEWEST):
        return ""
    lowest, newest = (".".join(map(str, bound)) for bound in (LOWEST, NEWEST))
    return f"open_clip {version}: --loss is tested with {lowest} to {newest}, and tried with this"


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
    if importlib.util.find_spec("training") is not None:
        return (
            "open_clip_train is not installed, but a trainer is that is called `training`: "
            "python -m rankloss_open_clip --trainer training.main"
        )
    return f"open_clip_train is not installed: {INSTALL}"
