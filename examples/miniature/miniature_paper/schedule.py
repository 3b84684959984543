"""Many runs on the cores there are: one after the other in each place, with an estimate of the time left."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

Progress = Callable[[str, float], None]


class Run(Protocol):
    """What is done: a setting of the grid, for instance. Runs are told apart by equality."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def loss(self) -> str:
        """Runs of the same loss and backbone take about as long."""

    @property
    def backbone(self) -> str:
        """See ``loss``."""


Work = Callable[[Any, Progress], Awaitable[None]]


class Board(Protocol):
    """What is told of every run."""

    def start(self, setting: Run) -> None:
        """A run begins."""

    def update(self, setting: Run, stage: str, share: float) -> None:
        """A run is in this stage, of which this share is done."""

    def finish(self, setting: Run, error: Exception | None) -> None:
        """A run is over; it failed if there is an error."""


async def run_all(
    settings: Sequence[Run],
    work: Work,
    *,
    jobs: int,
    board: Board,
    expected: type[Exception] | tuple[type[Exception], ...],
) -> dict[Any, Exception]:
    """Do every run, ``jobs`` of them at a time, in the given order.

    A run that fails does not stop the others. Cancelling cancels every run and waits until each has ended.

    Args:
        settings: What to do.
        work: Does one run, and says how far it is.
        jobs: How many at a time.
        board: Is told what happens.
        expected: Errors by which a run fails; any other one is a bug, ends everything and is raised.

    Returns:
        The errors of the runs that failed.
    """
    if jobs < 1:
        raise ValueError(f"jobs: must be at least 1, got {jobs}")
    waiting = deque(settings)
    failed: dict[Any, Exception] = {}

    async def place() -> None:
        while waiting:
            setting = waiting.popleft()
            board.start(setting)
            error: Exception | None = None
            try:
                await work(setting, lambda stage, share, of=setting: board.update(of, stage, share))
            except expected as caught:
                error = failed[setting] = caught
            board.finish(setting, error)

    places = [asyncio.create_task(place()) for _ in range(min(jobs, len(waiting)))]
    try:
        # Not gather, which is over with the first place that is cancelled: the others would be cancelled
        # again, in the middle of ending their children.
        if places:
            await asyncio.wait(places, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in places:
            task.cancel()
        await asyncio.gather(*places, return_exceptions=True)
    for task in places:
        if not task.cancelled():
            task.result()
    return failed


class Estimate:
    """How long the rest will take, by how long runs of the same kind took.

    Args:
        waiting: Every run that is to be done.
        jobs: How many are done at a time.
        known: Seconds of earlier runs, on this machine or another; they count until the first run of this
            session has ended.
        clock: Tells the time.
    """

    def __init__(
        self,
        waiting: Sequence[Run],
        jobs: int,
        known: Sequence[tuple[Run, float]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = list(waiting)
        self._jobs = jobs
        self._known = list(known)
        self._measured: list[tuple[Run, float]] = []
        self._started: dict[Run, float] = {}
        self._clock = clock

    def start(self, setting: Run) -> None:
        """A run begins."""
        self._waiting.remove(setting)
        self._started[setting] = self._clock()

    def finish(self, setting: Run, *, counts: bool = True) -> float:
        """A run is over: return its seconds, which are an example for others unless it failed."""
        seconds = self._clock() - self._started.pop(setting)
        if counts:
            self._measured.append((setting, seconds))
        return seconds

    def left(self) -> float | None:
        """Return the seconds that are left, or None as long as nothing is known."""
        now = self._clock()
        total = 0.0
        for setting, elapsed in [(s, 0.0) for s in self._waiting] + [
            (s, now - start) for s, start in self._started.items()
        ]:
            usual = self._usual(setting)
            if usual is None:
                return None
            total += max(usual - elapsed, 0.0)
        return total / max(1, min(self._jobs, len(self._waiting) + len(self._started)))

    def _usual(self, setting: Run) -> float | None:
        examples = self._measured or self._known
        kinds: list[Callable[[Run], bool]] = [
            lambda s: (s.loss, s.backbone) == (setting.loss, setting.backbone),
            lambda s: s.backbone == setting.backbone,
            lambda _: True,
        ]
        for alike in kinds:
            seconds = [value for s, value in examples if alike(s)]
            if seconds:
                return sum(seconds) / len(seconds)
        return None
