"""Which versions of open_clip ``--loss`` was tested with, and what is said about the others."""

from __future__ import annotations

import re
from dataclasses import dataclass

OLDEST = (2, 26, 1)
"""The first release whose trainer is the package ``open_clip_train``."""

LOWEST, NEWEST = (3, 0, 0), (3, 3, 0)
"""The releases that the test matrix runs."""


@dataclass(frozen=True)
class Verdict:
    """What is thought of a version of open_clip.

    Attributes:
        usable: Whether ``--loss`` may be tried with it at all.
        remark: The reason against it, or a warning; empty for a version that is tested.
    """

    usable: bool
    remark: str = ""


def judge(version: str) -> Verdict:
    """Say what is known of ``--loss`` with a version of open_clip.

    A number says less than the modules themselves: what was not tested is tried, with a warning, and
    :mod:`rankloss_open_clip.seams` refuses a trainer that is not laid out as it has to be.

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


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
