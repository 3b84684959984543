"""The lock of a folder of features, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a folder.

    Args:
        folder: The folder.
        wait: Wait for another process that holds it.

    Raises:
        ValueError: Another process holds it, and ``wait`` is False.
        OSError: The folder cannot be written.
    """
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:  # systems differ in which
            lock.seek(0)
            raise ValueError(f"--output {folder} is being written by {lock.read()!r}") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%c}")
        lock.flush()
        yield
