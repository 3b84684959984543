"""One bar for the whole demo, and how much time is left."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

STARTING, TRAINER_START, TRAINING = "Starting", "Starting the trainer", "Training"
EVALUATION, PICTURE, DONE = "Evaluating", "Drawing the picture", "Done"

# Seconds on one core.
_EXPECTED = {
    STARTING: 8.0,
    "Drawing in colour": 8.0,
    "Drawing line art": 8.0,
    TRAINER_START: 10.0,
    TRAINING: 35.0,  # an epoch
    EVALUATION: 20.0,
    PICTURE: 4.0,
    DONE: 0.0,
}

_PRIOR_SECONDS = 3.0  # at the expected pace, that count beside what was measured


def expected(epochs: int, trainings: int, cores: int) -> dict[str, float]:
    """Return the seconds that every stage is expected to take."""
    at_once = min(trainings, cores)
    # Side by side the trainings share nothing; the threads of one of them gain less the more they are.
    training = epochs * _EXPECTED[TRAINING] * trainings / at_once / (cores / at_once) ** 0.5
    return {**_EXPECTED, TRAINING: training}


class Forecast:
    """How much time is left, from the seconds that every stage is expected to take and from what was seen.

    A machine that is slower than expected is slower in what is left, too. A stage may be skipped.
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = dict(expected), clock
        self._started = self._reported = clock()
        self.stage = next(iter(self._expected))
        self._finished = self._done = 0.0  # expected seconds: of the stages before, and of all that is done
        self._shown = 0.0

    def begin(self, stage: str) -> None:
        """The stage before ends, and this one begins."""
        self.report(1.0)
        self.stage, self._finished = stage, self._done

    def report(self, share: float) -> None:
        """So much of the present stage is done."""
        self._done, self._reported = self._finished + share * self._expected[self.stage], self._clock()

    def track(self, items: Iterable[Any], length: int, stage: str) -> Iterator[Any]:
        """A loop that is a stage of its own; see :data:`examples_common.terminal.Track`."""
        self.begin(stage)
        for number, item in enumerate(items, 1):
            yield item
            self.report(number / length)

    @property
    def remaining(self) -> float:
        """Seconds until everything is done."""
        stages = list(self._expected)
        left = self._finished - self._done
        left += sum(self._expected[stage] for stage in stages[stages.index(self.stage) :])
        pace = (self._reported - self._started + _PRIOR_SECONDS) / (self._done + _PRIOR_SECONDS)
        return max(0.0, pace * left - (self._clock() - self._reported))

    @property
    def share(self) -> float:
        """How much of everything is done; it never falls."""
        elapsed, remaining = self._clock() - self._started, self.remaining
        self._shown = max(self._shown, elapsed / (elapsed + remaining) if elapsed else 0.0)
        return self._shown


class _Bar(Progress):
    """Moves by the clock, between two reports too."""

    def get_renderables(self) -> Iterable[Any]:
        """What is drawn, ten times a second."""
        for task in self.tasks:
            forecast = task.fields["forecast"]
            left = f"about {clock_time(forecast.remaining)} left" if forecast.remaining else ""
            self.update(task.id, completed=forecast.share, description=forecast.stage, left=left)
        yield from super().get_renderables()


def clock_time(seconds: float) -> str:
    """Return minutes and seconds.

    Example:
        >>> clock_time(312.7)
        '5:12'
    """
    return str(timedelta(seconds=int(seconds))).removeprefix("0:").removeprefix("0")


def bar(console: Console, forecast: Forecast) -> Progress:
    """Return the bar of a forecast, to be entered; it moves until it is left."""
    texts = ("{task.description}", "{task.percentage:>3.0f} %", "{task.fields[left]}")
    stage, share, left = (TextColumn(text, markup=False) for text in texts)
    progress = _Bar(stage, BarColumn(), share, TimeElapsedColumn(), left, console=console)
    progress.add_task("", total=1.0, forecast=forecast, left="")
    return progress
