"""Imports of packages that an extra installs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra in the error of an import within the context.

    Args:
        name: The extra of rankloss that installs the packages.

    Raises:
        ModuleNotFoundError: A package is missing; the error says how to install it.

    Example:
        >>> with extra("lightning"):
        ...     import no_such_package
        Traceback (most recent call last):
        ModuleNotFoundError: No module named 'no_such_package': pip install 'rankloss[lightning]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        text = f"{error}: pip install 'rankloss[{name}]'"
        raise ModuleNotFoundError(text, name=error.name, path=error.path) from error
