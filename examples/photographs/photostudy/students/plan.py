"""The plan of part 2a, as preregistration-part2.md has it: the tries, the arms, the seeds, the comparisons.

Nothing here trains or draws a random number: the same records lead to the same settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from photostudy import plan as part1
from photostudy.plan import Changes, Find, MissingError, Search, score

from .losses import ARMS, RANKED
from .train import Setting

Point = tuple[float, ...]  # a value of each of an arm's fields
Pair = tuple[str, str]  # an arm minus another
CLIP, RANKS = "clip", "ranks"
TAUGHT = tuple(arm for arm in ARMS if arm not in (CLIP, "rankclip"))

_RANKED: dict[str, Point] = {"weight": (8.0, 32.0), "top_k": (4, 8, 16)}
_SCALED: dict[str, Point] = {"weight": (1.0, 4.0), "scale": (10.0, 20.0, 40.0)}
# Fields of Setting, with the values that are tried: each a constant factor above the one before it.
GRIDS: dict[str, dict[str, Point]] = {
    "rankclip": {"weight": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
    **dict.fromkeys(RANKED, _RANKED),
    "softmax": _SCALED,
    "pearson": _SCALED,
    "distances": {"weight": (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)},
    "cka": {"weight": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
    "projected-mimicry": {"weight": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
}
COMPARISONS: tuple[Pair, ...] = (
    *((arm, CLIP) for arm in GRIDS),
    *((arm, RANKS) for arm in TAUGHT if arm != RANKS),
)
OTHERS = 9  # tests of part 2b, in the same correction; p = 1 until their trainings are there


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of the study."""

    name: str
    start: Changes  # where CLIP's search starts
    factors: dict[str, tuple[float, ...]]  # of CLIP's search
    tuning_seeds: tuple[int, int]  # of CLIP's search
    try_seed: int
    best_seeds: tuple[int, ...]  # of the best two tries
    tries: int  # of an arm
    rounds: int  # beyond the edge of a grid, at most
    seeds: tuple[int, ...]  # of the test side


FULL = Plan(
    "full",
    start={},
    factors={"lr": (5e-4, 2e-3), "label_smoothing": (0.1, 0.2)},
    tuning_seeds=(910, 911),
    try_seed=930,
    best_seeds=(931, 932),
    tries=6,
    rounds=2,
    seeds=tuple(range(3000, 3008)),
)
QUICK = Plan(
    "quick",
    start={"train_pictures": 1000, "epochs": 2},
    factors={},
    tuning_seeds=(0, 1),
    try_seed=0,
    best_seeds=(0,),
    tries=1,
    rounds=0,
    seeds=(1, 2),
)
PLANS = {plan.name: plan for plan in (FULL, QUICK)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """An arm's tries, as far as the records reach."""

    tries: dict[Point, dict[int, float]]  # R@10 on the dev side, by seed
    chosen: Changes | None  # fields of Setting; None: not known yet
    due: tuple[Any, ...]  # settings that are missing for the next step; empty: the choice is made
    fields: tuple[str, ...]  # of a point


def of_clip(plan: Plan, find: Find) -> Search:
    """Follow CLIP's search, by the rule of part 1."""
    return part1.search(plan, CLIP, find, Setting)


def choice(
    plan: Plan, arm: str, base: Changes, find: Find, grid: Mapping[str, Point] | None = None,
    kind: Callable[..., Any] = Setting,
) -> Choice:  # fmt: skip
    """Follow an arm's tries.

    All of the grid are trained with the first seed, the best two with two more, whose mean decides. While the
    winner is at an edge, the next value of that field is tried with the same two seeds, the second one where
    it is ahead of the winner with the first. ``grid`` is the arm's of :data:`GRIDS` where it is None, and
    ``kind`` the class of the settings.
    """
    fields = {name: [*values] for name, values in (grid or GRIDS[arm]).items()}
    found = _Found(arm, base, find, tuple(fields), kind)
    points = [*itertools.product(*fields.values())][: plan.tries]
    try:
        found.score(points, [plan.try_seed])
        best = sorted(points, key=lambda point: -found.tries[point][plan.try_seed])[:2]
        found.score(best, plan.best_seeds)
        winner = max(best, key=lambda point: found.mean(point, plan.best_seeds))
        for _ in range(plan.rounds):
            new = _beyond(fields, winner)
            first = plan.best_seeds[0]
            found.score(new, [first])
            ahead = [point for point in new if found.tries[point][first] > found.tries[winner][first]]
            found.score(ahead, plan.best_seeds)
            best_of_all = max([winner, *ahead], key=lambda point: found.mean(point, plan.best_seeds))
            if best_of_all == winner:
                break
            winner = best_of_all
        return Choice(found.tries, found.changes(winner), (), found.fields)
    except MissingError as missing:
        return Choice(found.tries, None, missing.settings, found.fields)


@dataclasses.dataclass
class _Found:
    """The scores of an arm's tries on the dev side."""

    arm: str
    base: Changes
    find: Find
    fields: tuple[str, ...]
    kind: Callable[..., Any]
    tries: dict[Point, dict[int, float]] = dataclasses.field(default_factory=dict)

    def changes(self, point: Point) -> Changes:
        return {**self.base, **dict(zip(self.fields, point, strict=True))}

    def score(self, points: Iterable[Point], seeds: Sequence[int]) -> None:
        """Look up scores of all points with all seeds."""
        wanted = {
            self.kind(self.arm, seed, "dev", **self.changes(point)): (point, seed)
            for point in points
            for seed in seeds
        }
        records = self.find([*wanted])
        for setting, (point, seed) in wanted.items():
            if setting in records:
                self.tries.setdefault(point, {})[seed] = score(records[setting])
        if missing := tuple(one for one in wanted if one not in records):
            raise MissingError(missing)

    def mean(self, point: Point, seeds: Sequence[int]) -> float:
        return fmean(self.tries[point][seed] for seed in seeds)


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


def arms(plan: Plan, find: Find) -> dict[str, list[Setting]]:
    """Return the trainings on the test side of every arm whose setting is chosen."""
    clip = of_clip(plan, find)
    if clip.due:
        return {}
    chosen: dict[str, Any] = {CLIP: clip.chosen}
    chosen |= {arm: choice(plan, arm, clip.chosen, find).chosen for arm in GRIDS}
    return {
        arm: [Setting(arm, seed, "test", **changes) for seed in plan.seeds]
        for arm, changes in chosen.items()
        if changes is not None
    }
