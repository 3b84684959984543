"""Errors of the commands: they begin with the option that a user typed."""

from __future__ import annotations

import re
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


def message_of(error: Exception) -> str:
    """The message of an error; of one in a process that reads pictures, without the traceback there."""
    text = str(error)
    # torch raises a worker's error again, with the traceback as its message: "Caught KIND in DataLoader
    # worker process 0.", then the traceback, which ends with "KIND: MESSAGE".
    in_worker = re.match(r"Caught (\w+) in DataLoader worker", text)
    if in_worker is None:
        return text
    *_, message = re.split(rf"^(?:\w+\.)*{in_worker[1]}: ", text, flags=re.MULTILINE)
    return message.strip()


def flag(name: str) -> str:
    """The option of the command line by its name in the parsed arguments."""
    return f"--{name.replace('_', '-')}"
