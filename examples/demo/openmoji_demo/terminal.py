"""Parts of the examples' commands: messages, exit statuses, progress bars, and a queue of runs."""

import argparse
import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import track as rich_track

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
Report = Callable[[str, float], None]  # a stage, and the share of it that is done


def positive(text: str) -> int:
    """Parse a number of at least 1, as the type of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is: no markup, no highlighting, no line breaks of our own."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def status_of(run: Callable[[Console], int]) -> int:
    """Call ``run`` with a console and return its exit status: 1 after an error, 130 after Ctrl-C."""
    console = Console()
    try:
        return run(console)
    except (RuntimeError, ValueError, OSError) as error:
        say(console, f"Error: {error}", "bold red")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        say(console, "Interrupted. Repeat the command to continue; finished work is kept.", "red")
        return 130


def tracker(console: Console) -> Track:
    """Return a function that wraps a loop in a progress bar, given its length and a description."""
    return lambda items, length, what: rich_track(items, description=what, total=length, console=console)


def bars(console: Console) -> Progress:
    """Return the progress bars of trainings."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,  # runs take minutes, so the estimate needs a long window
    )


async def run_all(
    runs: Sequence[Any],
    work: Callable[[Any, Report], Awaitable[None]],
    *,
    jobs: int,
    console: Console,
    expected: tuple[type[Exception], ...],
) -> dict[Any, Exception]:
    """Do every run in the given order, ``jobs`` at a time, with a bar for each and one for all of them.

    Runs are hashable and have a ``name``. One that fails with an ``expected`` error, which is returned, does
    not stop the others; any other error cancels these and is raised. Cancelling, also by SIGTERM, cancels
    every run and waits until each has cleaned up.
    """
    waiting, finished, failed = iter(runs), itertools.count(1), {}
    shares: dict[Any, float] = {}  # of every run that has started
    with bars(console) as progress:
        total = progress.add_task("All runs", total=len(runs))

        async def one(run: Any) -> None:
            bar, started = progress.add_task(run.name, total=1.0), time.monotonic()

            def report(stage: str, share: float) -> None:
                shares[run] = share
                progress.update(bar, completed=share, description=f"{run.name}: {stage}")
                progress.update(total, completed=sum(shares.values()))

            try:
                await work(run, report)
                outcome = f"{time.monotonic() - started:.0f} s"
            except expected as error:
                failed[run] = error
                outcome = f"failed: {error}"
            report("done", 1.0)
            progress.remove_task(bar)
            line = f"{next(finished)}/{len(runs)}  {run.name}  {outcome}"
            say(console, line, "red" if run in failed else "")

        async def worker() -> None:
            for run in waiting:
                await one(run)

        workers = [asyncio.create_task(worker()) for _ in range(min(jobs, len(runs)))]
        with contextlib.suppress(NotImplementedError, ValueError):  # Windows, or not in the main thread
            cancel = asyncio.current_task().cancel
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cancel)
        try:
            # Not gather, which on cancellation cancels the workers again while their children shut down.
            if workers:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    for task in workers:
        if not task.cancelled():
            task.result()
    return failed
