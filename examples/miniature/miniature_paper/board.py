"""The progress of all runs, on a terminal or in a log."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .schedule import Estimate, Run


class RichBoard:
    """A bar for everything with the time left, and one for each run that is going on.

    Every run that ends leaves a line, so a log shows the same without the bars.

    Args:
        console: Where to.
        settings: Every run that is to be done.
        jobs: How many at a time.
        known: Seconds of earlier runs.
    """

    def __init__(
        self,
        console: Console,
        settings: Sequence[Run],
        jobs: int,
        known: Sequence[tuple[Run, float]] = (),
    ) -> None:
        self._console = console
        self._estimate = Estimate(settings, jobs, known)
        self._total = len(settings)
        self._over = 0
        self._bars: dict[Run, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
        )
        self._all = self._progress.add_task("All runs", total=self._total, said=self._left())

    def __enter__(self) -> RichBoard:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, setting: Run) -> None:
        """A run begins."""
        self._estimate.start(setting)
        self._bars[setting] = self._progress.add_task(setting.name, total=100, said="starting")

    def update(self, setting: Run, stage: str, share: float) -> None:
        """A run is in this stage, of which this share is done."""
        self._progress.update(self._bars[setting], completed=round(100 * share), said=stage)
        self._progress.update(self._all, said=self._left())

    def finish(self, setting: Run, error: Exception | None) -> None:
        """A run is over."""
        seconds = self._estimate.finish(setting, counts=error is None)
        self._progress.remove_task(self._bars.pop(setting))
        self._over += 1
        left = self._left()
        self._progress.update(self._all, completed=self._over, said=left)
        said = f"{self._over}/{self._total}  {setting.name}  "
        if error is None:
            self._console.print(
                f"{said}{seconds:.0f} s  {left}", markup=False, highlight=False, soft_wrap=True
            )
        else:
            self._console.print(
                f"{said}failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )

    def _left(self) -> str:
        seconds = self._estimate.left()
        return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> duration(40), duration(700), duration(9000)
        ('40 s', '12 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(datetime.timedelta(seconds=seconds) / datetime.timedelta(minutes=1))
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
