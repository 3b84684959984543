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

    def track(items: Iterable[Any], length: int, description: str) -> Iterable[Any]:
        return rich_track(items, description=description, total=length, console=console)

    return track


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
    runs: Sequence[Any], work: Callable[[Any, Report], Awaitable[None]], *, jobs: int, console: Console
) -> None:
    """Do every run, ``jobs`` at a time, with a bar for each and one for all of them.

    Runs are hashable and have a ``name``. The first that fails cancels the others, and its error is raised.
    Cancelling, also by SIGTERM, cancels every run and waits until each has cleaned up.
    """
    places = asyncio.Semaphore(jobs)
    finished = itertools.count(1)
    shares: dict[Any, float] = {}  # of every run that has started
    with bars(console) as progress:
        bar_of_all = progress.add_task("All runs", total=len(runs))

        async def do(run: Any) -> None:
            """Do one run, once there is a place for it, and show its course."""
            async with places:
                bar = progress.add_task(run.name, total=1.0)
                started = time.monotonic()

                def report(stage: str, share: float) -> None:
                    shares[run] = share
                    progress.update(bar, completed=share, description=f"{run.name}: {stage}")
                    progress.update(bar_of_all, completed=sum(shares.values()))

                await work(run, report)
                report("done", 1.0)
                progress.remove_task(bar)
                seconds = time.monotonic() - started
                say(console, f"{next(finished)}/{len(runs)}  {run.name}  {seconds:.0f} s")

        tasks = [asyncio.create_task(do(run)) for run in runs]
        with contextlib.suppress(NotImplementedError, ValueError):  # Windows, or not in the main thread
            cancel = asyncio.current_task().cancel
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cancel)
        try:
            # Not gather, which on cancellation cancels the runs again while their children shut down.
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled():
            task.result()
