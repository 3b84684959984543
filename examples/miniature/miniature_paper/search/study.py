"""Studies: comparisons whose plan, in ``studies.yaml``, is fixed before the first training.

A study has arms with equally many tries each. The tries of an arm go through rounds on the validation side;
the best one of every arm is confirmed once on the test side, all of them with the same seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from examples_common.records import Store
from examples_common.statistics import ALPHA
from statsmodels.stats.power import TTestPower

from miniature_paper import grid
from miniature_paper.grid import Setting

from .objective import RECALL, SCORES
from .trials import LOSS, PLANS, RECIPE, REFERENCE, SIZES, TEST, Attempt, Trial, size_name, teacher_folder

RESULTS = Path(__file__).resolve().parents[2] / "results"
STUDIES = tuple(PLANS)
SETTING = "setting"  # the arm of a study whose tries all compete
# What is computed from a teacher beforehand, beside its weights, and the ending of its file.
FILES = {"texts": ".npz", "features": ".npz", "components": ".npy", "sentences": ".npz"}


@dataclasses.dataclass(frozen=True)
class Round:
    """Settings of the tries of one round."""

    epochs: int
    seeds: tuple[int, ...]  # disjoint between rounds
    keep: int = 1  # how many tries of an arm continue; after the last round, the winner alone


@dataclasses.dataclass(frozen=True)
class Axis:
    """Axis of a grid: an argument, or several that have the same value."""

    flags: tuple[str, ...]
    values: tuple[float, ...]  # to begin with, each so many times the one before
    bounds: tuple[float, float] = (0.0, math.inf)

    def beside(self, value: float) -> list[float]:
        """Return the values before and after one, as far as there are any."""
        ratio = self.values[1] / self.values[0]
        return [x for x in (value / ratio, value * ratio) if self.bounds[0] <= x <= self.bounds[1]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """An arm whose tries are all combinations of some values, and which can be continued beyond them."""

    arm: str
    loss: str
    given: tuple[tuple[str, str], ...]  # arguments that all tries share
    axes: tuple[Axis, ...]

    def trial(self, values: Iterable[float]) -> Trial:
        """Return the try with one value for each axis."""
        words = [f"{value:g}" for value in values]
        varied = ((flag, word) for axis, word in zip(self.axes, words, strict=True) for flag in axis.flags)
        return Trial("-".join([self.arm, *words]), self.arm, (*self.given, *varied), self.loss)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The tries to begin with."""
        return tuple(map(self.trial, product(*(axis.values for axis in self.axes))))

    def beside(self, trial: Trial) -> list[Trial]:
        """Return the tries that differ from one by a step along one axis, tried or not."""
        changes = dict(trial.changes)
        values = [float(changes[axis.flags[0]]) for axis in self.axes]
        return [
            self.trial([*values[:number], other, *values[number + 1 :]])
            for number, axis in enumerate(self.axes)
            for other in axis.beside(values[number])
        ]


@dataclasses.dataclass(frozen=True)
class Together:
    """An arm made of winners of others, which is known when these are."""

    best: int  # how many of the study's rivals, the best of their last round
    beside: str = ""  # another arm whose winner is part of it
    renamed: tuple[
        tuple[str, str], ...
    ] = ()  # its arguments, the weight first, and what they are called here

    def grid(self, arm: str, study: Study, winners: Mapping[str, Trial], worth: Mapping[str, float]) -> Grid:
        """Return the arm's grid: a quarter, half and all of the first weight, half and all of the second."""
        best = sorted(study.rivals, key=lambda name: (-worth[name], name))[: self.best]
        given: dict[str, str] = {}
        weights = [study.grids[name].axes[0].flags[0] for name in best]
        for name in best:
            given |= dict(winners[name].changes)
        if self.beside:
            found = dict(winners[self.beside].changes)
            given |= {here: found[there] for there, here in self.renamed}
            weights.append(self.renamed[0][1])
        first, second = (float(given.pop(flag)) for flag in weights)
        axes = Axis((weights[0],), (first / 4, first / 2, first)), Axis((weights[1],), (second / 2, second))
        return Grid(arm, winners[best[0]].loss, tuple(given.items()), axes)


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of arms."""

    name: str
    size: str  # full or quick
    title: str
    grid: grid.Preset  # pairs, batch size and limits
    whole: bool  # whether the test side is measured with everything that the grid measures
    teacher: Attempt | None  # a model that is trained first, and whose rankings some arms follow
    arms: dict[str, tuple[Trial, ...]]  # the tries by the arm's name
    rounds: tuple[Round, ...]
    confirmation: Round
    score: str  # what tries are chosen by and the primary tests compare, one of objective.SCORES
    rival: str | None = None  # what every other arm is compared with, as well as with plain CLIP
    # So many factors that helped in the first round are combined, around the recipe, which goes through every
    # round: a stronger setting is one that is stronger than the recipe. None are combined if it is 0.
    combined: int = 0
    grids: dict[str, Grid] = dataclasses.field(default_factory=dict)  # of the arms that have one
    # In a round whose best try has a neighbour that was never tried, the neighbour joins it; so many per arm.
    extensions: int = 0
    rivals: tuple[str, ...] = ()  # the arms that are combined
    together: dict[str, Together] = dataclasses.field(default_factory=dict)  # arms of winners, by name
    spread: Spread | None = None  # what the number of seeds was computed from
    note: str = ""  # what the report says about the plan
    caution: str = ""  # and about the records there are

    @property
    def along(self) -> dict[str, Trial]:
        """The recipe, where it goes through every round and the confirmation."""
        return {RECIPE.name: RECIPE} if self.combined else {}

    @property
    def names(self) -> list[str]:
        """All arms, those included whose tries are not known yet."""
        return list(dict.fromkeys([*self.arms, *self.together]))

    def with_grid(self, grid: Grid) -> Study:
        """Return the study with one more arm."""
        return dataclasses.replace(
            self, arms={**self.arms, grid.arm: grid.trials}, grids={**self.grids, grid.arm: grid}
        )

    def attempt(self, trial: Trial, one: Round, seed: int, side: str) -> Attempt:
        """Return one training of a try."""
        return Attempt(trial.name, trial.loss, trial.changes, one.epochs, seed, side, self.grid.name)

    def reference(self, trial: Trial, one: Round, seed: int, side: str) -> Attempt:
        """Return the training of plain CLIP that it is compared with."""
        name = "-".join([REFERENCE, *(f"{flag.strip('-')}-{value}" for flag, value in trial.shared)])
        return Attempt(name, REFERENCE, trial.shared, one.epochs, seed, side, self.grid.name)

    def attempts(self, trials: Iterable[Trial], one: Round, side: str) -> list[Attempt]:
        """Return every training that a comparison of these tries needs, seed by seed, plain CLIP first."""
        trials, makers = list(trials), (self.reference, self.attempt)
        made = (make(t, one, seed, side) for seed in one.seeds for make in makers for t in trials)
        return list(dict.fromkeys(made))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Number of seeds that a difference takes, given earlier paired differences of the same losses."""

    differences: tuple[float, ...]
    difference: float  # to be detected
    power: float

    @property
    def deviation(self) -> float:
        """The standard deviation of the earlier differences."""
        return float(np.std(self.differences, ddof=1))

    @property
    def seeds(self) -> int:
        """The least number of seeds with which a paired t-test finds the difference with this probability."""
        effect = self.difference / self.deviation
        return math.ceil(TTestPower().solve_power(effect_size=effect, alpha=ALPHA, power=self.power))


@functools.cache
def earlier_spread(
    grid_seeds: tuple[int, ...], search_seeds: tuple[int, ...], difference: float, power: float
) -> Spread:
    """Read the differences in R@10 between RankCLIP and CLIP of these seeds from the repository's records.

    Only named seeds count, so records that come later do not change a plan.

    Raises:
        ValueError: If one of them is not there.
    """
    full, score = grid.PRESETS["full"], SCORES[RECALL]

    def settings(seed: int) -> list[Any]:
        weights = {LOSS: 1.0, REFERENCE: 0.0}
        return [Setting(loss, "resnet", full.pairs, x, x, seed, "full") for loss, x in weights.items()]

    def tried(seed: int) -> list[Any]:
        search = load("search", "full")
        return [make(RECIPE, search.confirmation, seed, TEST) for make in (search.attempt, search.reference)]

    differences = []
    for folder, seeds, pair in (("full", grid_seeds, settings), ("search", search_seeds, tried)):
        store = Store(RESULTS / folder)
        for seed in seeds:
            records = store.of(pair(seed))
            if len(records) != 2:
                raise ValueError(f"{store.path}: seed {seed}, which a plan rests on, has no pair of records")
            differences.append(score(records[0]) - score(records[1]))
    return Spread(tuple(differences), difference, power)


def load(name: str, size: str) -> Study:
    """Return a study as ``studies.yaml`` has it."""
    content, own, common = PLANS[name], PLANS[name][size], SIZES[size_name(name, size)]
    compete = "factors" in content
    groups, wanted = content["factors" if compete else "arms"], own.get("tries")
    teacher = teacher_folder(common.teacher) if common.teacher else ""
    filled = {"{teacher}": teacher}
    for kind, ending in FILES.items():
        filled[f"{{{kind}}}"] = f"{teacher}/{kind}-{own['size'].get('pairs')}{ending}"

    def changes(entries: dict[str, str]) -> tuple[tuple[str, str], ...]:
        found = [(flag, value) for flag, value in entries.items() if flag != "loss"]
        for word, meant in filled.items():
            found = [(flag, value.replace(word, meant)) for flag, value in found]
        return tuple(found)

    def trial(group: str, title: str, entries: dict[str, str]) -> Trial:
        name = title if compete else f"{group}-{title}"
        return Trial(name, group, changes(entries), entries.get("loss", LOSS))

    def grid_of(group: str, given: dict[str, str], values: dict[str, list[float]]) -> Grid:
        bounds = content.get("bounds", {})
        axes = (
            Axis(tuple(flags.split()), tuple(own_values), tuple(bounds.get(flags, (0.0, math.inf))))
            for flags, own_values in values.items()
        )
        return Grid(group, given["loss"], changes(given), tuple(axes))

    chosen = own.get("arms", groups)
    grids = {group: grid_of(group, **groups[group]) for group in chosen if "values" in groups[group]}
    arms = {
        group: tuple(one for one in grids[group].trials if not wanted or one.name in wanted)
        if group in grids
        else tuple(trial(group, *one) for one in groups[group].items() if not wanted or one[0] in wanted)
        for group in chosen
    }
    together = {
        name: Together(one["best"], one.get("beside", ""), tuple(one.get("renamed", {}).items()))
        for name, one in content.get("together", {}).items()
    }
    if compete:
        arms = {SETTING: tuple(chain(*arms.values()))}
    seeds, spread = own["confirmation"]["seeds"], None
    if isinstance(seeds, dict):
        earlier = tuple(seeds["grid"]), tuple(seeds["search"])
        spread = earlier_spread(*earlier, seeds["difference"], seeds["power"])
        seeds = range(seeds["first"], seeds["first"] + spread.seeds)
    return Study(
        name,
        size,
        content["title"],
        grid=common.preset,
        whole=common.whole,
        teacher=common.teacher,
        arms=arms,
        rounds=tuple(Round(one["epochs"], tuple(one["seeds"]), one["keep"]) for one in own["rounds"]),
        confirmation=Round(own["confirmation"]["epochs"], tuple(seeds)),
        score=content["score"],
        rival=content.get("rival"),
        combined=content.get("combined", 0),
        grids=grids,
        extensions=own.get("extensions", 0),
        rivals=tuple(name for name in content.get("rivals", ()) if name in arms),
        together=together,
        spread=spread,
        note=own.get("note", ""),
        caution=own.get("caution", ""),
    )
