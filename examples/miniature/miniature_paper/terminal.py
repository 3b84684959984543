"""What the example's commands have in common: its packages, the machine, signals, progress."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .runs import Machine
    from .schedule import Work

Result = TypeVar("Result")
_NEEDED = (
    "captum", "jinja2", "matplotlib", "open_clip_train", "resvg_py", "rich", "sklearn", "torchmetrics",
    "umap", "webdataset",
)  # fmt: skip


def import_parts() -> None:
    """Import everything that is needed, or say how to install it."""
    try:
        for name in _NEEDED:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]'")


def machine(device: str | None, jobs: int | None) -> Machine:
    """Return what is run on: the device that was asked for, or a GPU if there is one.

    Raises:
        ValueError: If a GPU is asked for and there is none.
    """
    import torch

    from .runs import Machine

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"argument --device: {device}, but torch sees no GPU")
    return Machine.of(device, jobs)


def run_on(
    console: Any, todo: Sequence[Any], work: Work, jobs: int, known: Sequence[tuple[Any, float]] = ()
) -> dict[Any, Exception]:
    """Do every run with a board that shows it, and return the errors of those that failed.

    Args:
        console: Where the board is shown.
        todo: What to do.
        work: Does one run.
        jobs: How many at a time.
        known: Seconds of earlier runs.
    """
    from .board import RichBoard
    from .runs import MeasuringError
    from .schedule import run_all
    from .training import TrainingError

    with RichBoard(console, todo, jobs, known) as board:
        expected = (TrainingError, MeasuringError, OSError)
        return asyncio.run(
            cancelled_by_signals(run_all(todo, work, jobs=jobs, board=board, expected=expected))
        )


async def cancelled_by_signals(work: Coroutine[Any, Any, Result]) -> Result:
    """Let a polite request to end do what Ctrl-C does: end every child first."""
    task = asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def tracker(console: Any) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    """Return what wraps long loops."""
    from rich.progress import track

    def progress(items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        return track(items, description=what, total=length, console=console)

    return progress
