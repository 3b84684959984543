"""The plan of part 2c, as preregistration-part2c.md has it: the tries, the seeds, the comparisons.

Nothing here trains or draws a random number: the same records lead to the same settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from photostudy.measure import BOTH_WAYS
from photostudy.plan import Changes, Find, Search, score
from photostudy.students import plan as part2a
from photostudy.students.losses import PER_STEP
from photostudy.students.plan import CLIP, RANKS, Choice, Pair, Point
from photostudy.students.train import Setting

SETS = ("emojis", "icons")
_SCALED: dict[str, Point] = part2a.GRIDS["softmax"]
# Fields of Setting, with the values that are tried: each a constant factor above the one before it.
GRIDS: dict[str, dict[str, Point]] = {
    RANKS: {"weight": (4.0, 16.0, 64.0), "top_k": (4, 16)},
    **{arm: part2a.GRIDS[arm] for arm in ("softmax", "distances", "cka", "projected-mimicry")},
}
VARIANTS = ("picture-ranks", "text-ranks", PER_STEP)  # in the setting of the best try of ranks
COMPARISONS: tuple[Pair, ...] = (
    *((arm, CLIP) for arm in GRIDS),
    *((arm, RANKS) for arm in GRIDS if arm != RANKS),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of the study."""

    name: str
    clip: Mapping[str, part2a.Plan]  # of CLIP's search, by data set
    arms: part2a.Plan  # of the other arms' tries, which both data sets score together
    icons: tuple[int, int]  # to train on, and of each other side
    emojis: int | None  # the first so many; None: all

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the test side."""
        return self.arms.seeds


_ARMS = dataclasses.replace(
    part2a.FULL, factors={}, try_seed=950, best_seeds=(951, 952), seeds=tuple(range(3200, 3208))
)
_CLIP = dataclasses.replace(part2a.FULL, tuning_seeds=(948, 949))
FULL = Plan(
    "full",
    {
        "emojis": dataclasses.replace(_CLIP, start={"train_pictures": 1097, "epochs": 30}),
        "icons": dataclasses.replace(_CLIP, start={"train_pictures": 8000, "epochs": 6}),
    },
    _ARMS,
    icons=(8000, 1000),
    emojis=None,
)
_SMALL = dataclasses.replace(part2a.QUICK, start={"train_pictures": 250, "epochs": 2})
QUICK = Plan("quick", dict.fromkeys(SETS, _SMALL), _SMALL, icons=(300, 50), emojis=500)
PLANS = {plan.name: plan for plan in (FULL, QUICK)}


def on(one: Setting, clip: Changes) -> Setting:
    """Return an arm's setting on a data set, where plain CLIP's own fields are these."""
    return dataclasses.replace(one, **clip)


def joint(finds: Mapping[str, Find], clip: Mapping[str, Changes]) -> Find:
    """Return a function that finds the mean score of a setting on all data sets, where all are known."""

    def find(settings: Any) -> dict[Setting, Any]:
        found = {}
        for one in settings:
            records = [finds[name]([on(one, clip[name])]) for name in SETS]
            if all(records):
                scores = (score(record) for of in records for record in of.values())
                found[one] = {"metrics": {"retrieval": {BOTH_WAYS: fmean(scores)}}}
        return found

    return find


def of_clip(sizes: Plan, name: str, find: Find) -> Search:
    """Follow CLIP's search on a data set."""
    return part2a.of_clip(sizes.clip[name], find)


def choice(sizes: Plan, arm: str, find: Find) -> Choice:
    """Follow an arm's tries, given a joint ``find``."""
    return part2a.choice(sizes.arms, arm, {}, find, GRIDS[arm])


def variants(sizes: Plan, ranks: Choice | None) -> dict[str, list[Setting]]:
    """Return the settings of ranks and of its variants that are compared on the dev side, once known."""
    if ranks is None or ranks.chosen is None:
        return {}
    return {
        arm: [Setting(arm, seed, "dev", **ranks.chosen) for seed in sizes.arms.best_seeds]
        for arm in (RANKS, *VARIANTS)
    }


def tests(sizes: Plan, choices: Mapping[str, Choice], clip: Changes) -> dict[str, list[Setting]]:
    """Return the trainings on the test side of a data set, of every arm whose setting is chosen."""
    chosen = {CLIP: {}, **{arm: one.chosen for arm, one in choices.items()}}
    return {
        arm: [on(Setting(arm, seed, "test", **changes), clip) for seed in sizes.seeds]
        for arm, changes in chosen.items()
        if changes is not None
    }
