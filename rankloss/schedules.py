r"""λ over training: plain functions of the progress.

A schedule takes (i, n), "the i-th of n", counted from 1, and gives the factor of the rank terms. The caller
counts epochs, as in the paper, or optimizer steps, for a finer ramp. With n = 1 the only epoch or step is
also the last and has the schedule's end value.

Any function with this signature is a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

__all__ = ["NAMES", "Schedule", "by_name", "constant", "cosine", "linear", "official", "rankclip"]

Schedule = Callable[[int, int], float]


def rankclip(i: int, n: int) -> float:
    """``clip((3i − 1) / (n − 1), 0, 2)``: the RankCLIP paper's formula as printed.

    λ starts above zero and reaches 2 after two thirds of training.

    Example:
        >>> [rankclip(i, 11) for i in (1, 4, 7, 11)]
        [0.2, 1.1, 2.0, 2.0]
    """
    i, n = _checked(i, n)
    return 2.0 if n == 1 else min(max((3 * i - 1) / (n - 1), 0.0), 2.0)


def official(i: int, n: int) -> float:
    """``clip(3(i − 1) / (n − 1), 0, 2)``: the formula of the RankCLIP authors' code; 0 in the first epoch.

    Example:
        >>> [official(i, 11) for i in (1, 6, 11)]
        [0.0, 1.5, 2.0]
    """
    return min(3 * _progress(i, n), 2.0)


def constant(i: int, n: int) -> float:
    """The constant 1.

    Example:
        >>> constant(3, 10)
        1.0
    """
    _checked(i, n)
    return 1.0


def linear(i: int, n: int) -> float:
    """``(i − 1) / (n − 1)``: from 0 to 1 in a straight line.

    Example:
        >>> [linear(i, 5) for i in (1, 2, 3, 4, 5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return _progress(i, n)


def cosine(i: int, n: int) -> float:
    """``(1 − cos(π(i − 1) / (n − 1))) / 2``: from 0 to 1 along half a cosine, flat at both ends.

    Example:
        >>> [round(cosine(i, 5), 3) for i in (1, 2, 3, 4, 5)]
        [0.0, 0.146, 0.5, 0.854, 1.0]
    """
    return (1 - math.cos(math.pi * _progress(i, n))) / 2


_BY_NAME: dict[str, Schedule] = {f.__name__: f for f in (rankclip, official, constant, linear, cosine)}

NAMES: tuple[str, ...] = tuple(_BY_NAME)


def by_name(name: str) -> Schedule:
    """The built-in schedule with the given name.

    Raises:
        ValueError: for another name.

    Example:
        >>> by_name("linear")(2, 3)
        0.5
    """
    if not (isinstance(name, str) and name in _BY_NAME):
        raise ValueError(f"schedule must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return _BY_NAME[name]


def _checked(i: int, n: int) -> tuple[int, int]:
    """Both as ints of Python, or a ValueError unless i is one of 1 … n."""
    if not (isinstance(i, Integral) and isinstance(n, Integral) and 1 <= i <= n):
        raise ValueError(f"a schedule needs integers 1 <= i <= n; got i={i!r}, n={n!r}")
    return int(i), int(n)  # NumPy's small integers would overflow


def _progress(i: int, n: int) -> float:
    """``(i − 1) / (n − 1)``; with n = 1 the end value, 1."""
    i, n = _checked(i, n)
    return 1.0 if n == 1 else (i - 1) / (n - 1)
