"""What the example's commands have in common: options, packages, the machine, signals, progress, errors."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .runs import Machine
    from .schedule import Work

Result = TypeVar("Result")
_EXAMPLE = Path(__file__).resolve().parents[1]
_NEEDED = (
    "captum", "jinja2", "matplotlib", "open_clip_train", "resvg_py", "rich", "sklearn", "torchmetrics",
    "umap", "webdataset",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes: the machine, and the folders."""
    add = parser.add_argument
    add("--jobs", type=int, default=None, help="runs at a time (default: one on each core, or as fit a GPU)")
    add("--device", default=None, help="cpu or cuda (default: a GPU if there is one)")
    add("--output", type=Path, default=Path("outputs/miniature"), help="folder for data and runs")
    add("--icons", type=Path, default=Path("outputs/icons"), help="the icons; built there if missing")
    add("--results", type=Path, default=None, help="folder of the records (default: by the preset)")
    add("--report", type=Path, default=None, help="folder of the report (default: by the preset)")
    add("--report-only", action="store_true", help="train nothing; report the records that are there")


def check_at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1; None is a default."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")


def complete_options(parser: argparse.ArgumentParser, args: argparse.Namespace, *, records: str) -> None:
    """Check what :func:`add_options` added, and fill in its folders.

    Args:
        parser: Reports what is wrong.
        args: Its options; ``preset`` among them.
        records: The folder of the records below ``results``.
    """
    check_at_least_one(parser, args, "jobs")
    if args.device is not None and args.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"argument --device: must be cpu or cuda, got {args.device}")
    # The records of the full preset are part of the repository: they are resumed from.
    home = _EXAMPLE if args.preset == "full" else args.output / args.preset
    args.results = args.results or home / "results" / records
    args.report = args.report or home / "report"
    for name in ("output", "icons", "results", "report"):
        setattr(args, name, getattr(args, name).resolve())


def reported(run: Callable[[Any], int]) -> int:
    """Call ``run`` with a console and return its exit status; errors and interruptions are said on it."""
    from rich.console import Console

    console = Console()
    try:
        return run(console)
    except (RuntimeError, ValueError, OSError) as error:
        console.print(f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print(
            "Interrupted. The same command goes on; --report-only reports what is there.", style="red"
        )
        return 130


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
