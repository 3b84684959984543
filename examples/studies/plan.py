"""From records to choices: nothing here trains or draws a random number.

A plan is followed by asking for records. The first question without all of its answers ends the plan with
:class:`MissingError`; the runner does these trainings, and follows the plan again from its beginning.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import yaml

from .records import Record

Scores = Callable[[Sequence[Any]], list[float]]
"""The scores of settings; raises :class:`MissingError`."""
Point = tuple[float, ...]  # a value of each field of a grid


class MissingError(RuntimeError):
    """Trainings of a data set that have no record."""

    def __init__(self, data: str, settings: Sequence[Any]) -> None:
        super().__init__(f"{data}: {len(settings)} trainings are missing")
        self.data, self.settings = data, settings


class Find:
    """The records of a data set; a call returns those of settings, by setting."""

    def __init__(self, data: str, records: Mapping[Any, Record]) -> None:
        self.data, self.records = data, records

    def __call__(self, settings: Iterable[Any]) -> dict[Any, Record]:
        """Return the records.

        Raises:
            MissingError: If some have none.
        """
        wanted = list(dict.fromkeys(settings))
        if missing := [one for one in wanted if one not in self.records]:
            raise MissingError(self.data, missing)
        return {one: self.records[one] for one in wanted}

    def there(self, settings: Iterable[Any]) -> dict[Any, Record]:
        """Return the records of those settings that have one."""
        return {one: self.records[one] for one in settings if one in self.records}

    def scores(self, measure: Callable[[Record], float]) -> Scores:
        """Return a function that returns the scores of settings by a measure."""
        return lambda settings: [measure(record) for record in self(settings).values()]

    def arms(self, settings: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, dict[int, Record]]:
        """Return the records of the test by arm and seed, which are trained seed by seed."""
        wanted = {
            arm: [dataclasses.replace(one, seed=seed, side="test") for seed in seeds]
            for arm, one in settings.items()
        }
        records = self(sorted(itertools.chain(*wanted.values()), key=lambda one: one.seed))
        return {arm: {one.seed: records[one] for one in of} for arm, of in wanted.items()}


def read(path: Path, preset: str) -> SimpleNamespace:
    """Return the entries of a plan in YAML: those of all presets, and the preset's own under its name."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = {name: content.pop(name) for name in ("full", "quick")}[preset]
    return SimpleNamespace(**{**content, **own, "preset": preset})


# --- the three rules by which a setting is chosen ---


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of some tries, with one seed."""

    arm: str
    tries: dict[Any, float]

    @property
    def chosen(self) -> Any:
        """The try with the largest score, the first of equal ones."""
        return max(self.tries, key=self.tries.__getitem__)


def best_of(arm: str, tries: Iterable[Any], scores: Scores) -> Best:
    """Return the best of some tries."""
    wanted = list(tries)
    return Best(arm, dict(zip(wanted, scores(wanted), strict=True)))


@dataclasses.dataclass(frozen=True)
class Try:
    """A level of a factor, with its score by seed."""

    factor: str
    level: float
    scores: Sequence[float]
    taken: bool

    @property
    def text(self) -> list[str]:
        """The factor, the level and the scores."""
        scores = ", ".join(f"{score:.2f}" for score in self.scores)
        return [self.factor.replace("_", " "), f"{self.level:g}", f"{scores}{' (taken)' * self.taken}"]


@dataclasses.dataclass(frozen=True)
class ByFactor:
    """The outcome of a search by one factor after another."""

    chosen: Any
    score: float | None  # the mean of both seeds; None where there is no factor
    tries: list[Try]


def by_factor(
    start: Any, factors: Mapping[str, Sequence[float]], seeds: tuple[int, int], scores: Scores
) -> ByFactor:
    """Search one factor after another, each around the best setting so far.

    Of each factor every other level is tried with the first seed. Those ahead of the setting so far, and this
    one, are trained with the second seed; the best mean is kept, the setting so far where means are equal.
    """
    chosen, tries = start, list[Try]()

    def scored(settings: Iterable[Any], seed: int) -> list[float]:
        return scores([dataclasses.replace(one, seed=seed) for one in settings])

    for factor, levels in factors.items():
        here = getattr(chosen, factor)
        at = {level: dataclasses.replace(chosen, **{factor: level}) for level in (here, *levels)}
        found = {level: [score] for level, score in zip(at, scored(at.values(), seeds[0]), strict=True)}
        ahead = [level for level in levels if found[level] > found[here]]
        again = [here, *ahead] if ahead else []
        for level, score in zip(again, scored([at[level] for level in again], seeds[1]), strict=True):
            found[level].append(score)
        best = max(ahead, key=lambda level: fmean(found[level]), default=here)
        if fmean(found[best]) <= fmean(found[here]):
            best = here
        tries += [Try(factor, level, found[level], level == best) for level in levels]
        chosen = at[best]
    score = fmean(score for seed in seeds for score in scored([chosen], seed)) if factors else None
    return ByFactor(chosen, score, tries)


@dataclasses.dataclass
class ByGrid:
    """The outcome of a search on a grid."""

    arm: str
    fields: list[str]
    tries: dict[Point, dict[int, float]]  # scores by seed
    chosen: Any = None

    def row(self) -> list[str]:
        """Return the arm, the values chosen, and every try with its scores."""

        def values(point: Iterable[float]) -> str:
            named = zip(self.fields, point, strict=True)
            return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in named)

        tries = (
            f"{values(point)}: {', '.join(f'{score:.2f}' for score in of.values())}"
            for point, of in self.tries.items()
        )
        chosen = values(getattr(self.chosen, name) for name in self.fields)
        return [f"`{self.arm}`", chosen, "; ".join(tries) or "–"]


def by_grid(
    arm: str, base: Any, grid: Mapping[str, Sequence[float]], sizes: SimpleNamespace, scores: Scores
) -> ByGrid:
    """Search a grid, whose values are each a constant factor above the one before.

    All points are trained with the first seed, ``sizes.try_seed``, the best two with ``sizes.best_seeds``,
    whose mean decides. While the winner is at an edge, the next value of that field is tried with the first
    of these seeds, and with the others where it is ahead of the winner; at most ``sizes.rounds`` times. Of
    the grid the first ``sizes.tries`` points are tried.
    """
    fields = {name: [*values] for name, values in grid.items()}
    found = ByGrid(arm, [*fields], {})
    seeds = sizes.best_seeds

    def at(point: Point, seed: int) -> Any:
        return dataclasses.replace(base, seed=seed, side="dev", **dict(zip(fields, point, strict=True)))

    def train(points: Iterable[Point], with_seeds: Sequence[int]) -> None:
        wanted = [(point, seed) for point in points for seed in with_seeds]
        for (point, seed), score in zip(wanted, scores([at(*one) for one in wanted]), strict=True):
            found.tries.setdefault(point, {})[seed] = score

    def mean(point: Point) -> float:
        return fmean(found.tries[point][seed] for seed in seeds)

    points = [*itertools.product(*fields.values())][: sizes.tries]
    train(points, [sizes.try_seed])
    best = sorted(points, key=lambda point: -found.tries[point][sizes.try_seed])[:2]
    train(best, seeds)
    winner = max(best, key=mean)
    for _ in range(sizes.rounds):
        new = _beyond(fields, winner)
        train(new, seeds[:1])
        ahead = [one for one in new if found.tries[one][seeds[0]] > found.tries[winner][seeds[0]]]
        train(ahead, seeds)
        best_of_all = max([winner, *ahead], key=mean)
        if best_of_all == winner:
            break
        winner = best_of_all
    found.chosen = at(winner, 0)
    return found


def _beyond(fields: Mapping[str, list[float]], winner: Point) -> list[Point]:
    """Return the points next to the winner beyond each edge that it is at; the fields get their values."""
    found = []
    for position, values in enumerate(fields.values()):
        low, high, ratio = min(values), max(values), values[1] / values[0]
        new = {low: low / ratio, high: high * ratio}.get(winner[position])
        if new is not None:
            values.append(type(low)(new))
            found.append((*winner[:position], values[-1], *winner[position + 1 :]))
    return found
