"""One bar over all stages of the demo, as long as the seconds that they are expected to take."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.progress import Progress

STARTING, TRAINING, EVALUATION, PICTURE = "Starting", "Training", "Evaluating", "Drawing the picture"

# Seconds on one core.
_EXPECTED = {
    STARTING: 8.0,
    "Drawing in colour": 8.0,
    "Drawing line art": 8.0,
    TRAINING: 35.0,  # an epoch
    EVALUATION: 20.0,
    PICTURE: 4.0,
}
_TRAINER_START = 10.0


def expected(epochs: int, trainings: int, cores: int) -> dict[str, float]:
    """Return the seconds that every stage is expected to take."""
    at_once = min(trainings, cores)
    # Side by side the trainings share nothing; the threads of one of them gain less the more they are.
    training = epochs * _EXPECTED[TRAINING] * trainings / at_once / (cores / at_once) ** 0.5
    return {**_EXPECTED, TRAINING: _TRAINER_START + training}


class Stages:
    """Moves a bar from stage to stage. On a machine that is slower than expected, so is what is left."""

    def __init__(self, expected: Mapping[str, float], bars: Progress) -> None:
        self._ahead, self._bars = dict(expected), bars
        self._finished = self._seconds = 0.0  # expected for the stages before, and for the present one
        self._task = bars.add_task("")
        self.begin(next(iter(expected)))

    def begin(self, stage: str) -> None:
        """End the present stage and begin another; what is skipped takes no time."""
        self.report(1.0)
        self._finished += self._seconds
        names = list(self._ahead)
        for skipped in names[: names.index(stage)]:
            del self._ahead[skipped]
        self._seconds = self._ahead.pop(stage)
        total = self._finished + self._seconds + sum(self._ahead.values())
        self._bars.update(self._task, description=stage, total=total)

    def report(self, share: float) -> None:
        """Move the bar to this share of the present stage."""
        self._bars.update(self._task, completed=self._finished + share * self._seconds)

    def track(self, items: Iterable[Any], length: int, stage: str) -> Iterator[Any]:
        """Loop over items as a stage of its own, as :data:`examples_common.terminal.Track` says."""
        self.begin(stage)
        for number, item in enumerate(items, 1):
            yield item
            self.report(number / length)
