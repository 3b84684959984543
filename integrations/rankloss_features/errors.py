"""Errors of the commands: they begin with the option that a user typed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankloss_features import packages


@contextmanager
def named_errors(named: str) -> Iterator[None]:
    """A context whose errors become a ValueError that begins with ``named``.

    Where a package is missing, it says which extra to install.
    """
    try:
        yield
    except ImportError as error:
        package, _, _ = (error.name or "").partition(".")
        extra = "encoders" if package in packages.MODULES else "features"
        raise ValueError(f"{named} needs a package: pip install 'rankloss[{extra}]' ({error})") from error
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    except Exception as error:  # a library's error for a name that it does not know
        raise ValueError(f"{named}: {type(error).__name__}: {error}") from error


def last_line(error: Exception) -> str:
    """The message of an error; of one in a process that reads pictures, without the traceback there."""
    text = str(error)
    if "DataLoader worker" in text:
        *_, last = text.strip().splitlines()  # the kind of the error, and its message
        _, _, text = last.partition(": ")
    return text


def flag(name: str) -> str:
    """The option of the command line by its name in the parsed arguments."""
    return f"--{name.replace('_', '-')}"
