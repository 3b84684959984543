"""Which versions of open_clip ``--loss`` is tested with, and what to do without a trainer."""

from __future__ import annotations

import importlib.util

INSTALL = "pip install 'open_clip_torch[training]>=3.0'"
"""The command that installs a supported trainer."""

TESTED = ("2.16.1", "2.24.0", "3.0.0", "3.1.0", "3.2.0", "3.3.0")
"""The releases that get no remark; the first two have no ``open_clip_train``, and are attached to by hand."""


def remark(version: str) -> str:
    """What a run's log says of a version of open_clip; empty for one that is tested.

    An untested version is tried: :mod:`rankloss_open_clip.patches` refuses a trainer with an unknown layout,
    which its number does not tell.

    Args:
        version: What ``open_clip.version.__version__`` says.

    Example:
        >>> remark("3.3.0")
        ''
        >>> remark("2.32.0")
        'open_clip 2.32.0: --loss is tested with 3.0.0 to 3.3.0, and tried with this'
    """
    if version.partition("+")[0] in TESTED:  # what follows is a local label
        return ""
    return f"open_clip {version}: --loss is tested with 3.0.0 to 3.3.0, and tried with this"


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
