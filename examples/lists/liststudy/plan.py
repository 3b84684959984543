"""The plan, as preregistration.md has it: the tries, the arms, the seeds, the comparisons.

Nothing here trains or draws a random number: the same records lead to the same settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from examples_common.records import Record

from .losses import OPTIONS
from .train import CLIP, Setting

Find = Callable[[Sequence[Setting]], Mapping[Setting, Record]]

MODELS = tuple(OPTIONS)
BESIDE = {model: f"{model} beside {CLIP}" for model in MODELS}
ARMS = (CLIP, *MODELS, *BESIDE.values())
SMOOTHINGS = ("0.1", "0.2")
_UNITS = {"squared_error": 16.0}  # of the weights, since its values are that much smaller


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a study."""

    name: str
    epochs: int
    start_epochs: int
    lists: int  # of a batch
    lrs: tuple[float, ...]
    weights: tuple[float, ...]
    choice_seed: int
    seeds: tuple[int, ...]
    train_pictures: int  # photographs
    emojis: int | None


FULL = Plan(
    "full",
    epochs=3,
    start_epochs=15,
    lists=200,
    lrs=(1e-4, 3e-4, 1e-3),
    weights=(0.25, 1.0, 4.0),
    choice_seed=940,
    seeds=tuple(range(4000, 4008)),
    train_pictures=6000,
    emojis=None,
)
QUICK = Plan("quick", 1, 1, 50, (1e-3,), (1.0,), 0, (1, 2), 1000, 240)
PLANS = {plan.name: plan for plan in (FULL, QUICK)}


@dataclasses.dataclass(frozen=True)
class Search:
    """An arm's tries with their scores, as far as the records reach."""

    arm: str
    scores: dict[Setting, float]
    due: tuple[Setting, ...]  # trainings that are missing

    @property
    def chosen(self) -> Setting | None:
        """The best try; None until all are there."""
        return None if self.due or not self.scores else max(self.scores, key=self.scores.__getitem__)


def score(record: Record, measure: str) -> float:
    """Return a record's measure, averaged over the divisions."""
    return fmean(record["metrics"][measure])


def searches(plan: Plan, primary: str, find: Find) -> dict[str, Search]:
    """Return every arm's search; a model beside CLIP's loss is tried with the option that is best alone."""
    found: dict[str, Search] = {}
    for arm in ARMS:
        tried = _tries(plan, arm, found)
        records = find(tried)
        scores = {one: score(records[one], primary) for one in tried if one in records}
        found[arm] = Search(arm, scores, tuple(one for one in tried if one not in records))
    return found


def _tries(plan: Plan, arm: str, found: Mapping[str, Search]) -> list[Setting]:
    sizes = {"epochs": plan.epochs, "lists": plan.lists, "start_epochs": plan.start_epochs}
    model = arm.partition(f" beside {CLIP}")[0]
    if arm in BESIDE.values():
        alone = found[model].chosen
        if alone is None:
            return []
        unit = _UNITS.get(model, 1.0)
        pairs = itertools.product([unit * weight for weight in plan.weights], plan.lrs[-2:])
        return [
            Setting(arm, plan.choice_seed, "choice", alone.option, lr, weight=weight, **sizes)
            for weight, lr in pairs
        ]
    options = SMOOTHINGS if arm == CLIP else OPTIONS[model]
    return [
        Setting(arm, plan.choice_seed, "choice", option, lr, **sizes)
        for option, lr in itertools.product(options, plan.lrs)
    ]


def arms(plan: Plan, found: Mapping[str, Search]) -> dict[str, list[Setting]]:
    """Return the trainings of every arm whose search is finished."""
    return {
        arm: [dataclasses.replace(search.chosen, seed=seed, side="test") for seed in plan.seeds]
        for arm, search in found.items()
        if search.chosen is not None
    }


def comparisons() -> list[tuple[str, str]]:
    """Return the tested differences, an arm minus another."""
    return [
        *((arm, CLIP) for arm in ARMS[1:]),
        *itertools.combinations(MODELS, 2),
        *itertools.combinations(BESIDE.values(), 2),
        *((beside, model) for model, beside in BESIDE.items()),
    ]
