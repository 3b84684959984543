"""The plan, as preregistration.md has it: the tries, the arms, the seeds, the comparisons.

Nothing here trains or draws a random number: the same records lead to the same settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from examples_common.records import Record
from examples_common.trainings import best

from .train import Setting

Find = Callable[[Sequence[Setting]], Mapping[Setting, Record]]
Search = dict[Setting, float | None]  # an arm's tries with their scores; None: missing
Pair = tuple[str, str]  # an arm minus another

CLIP, ORDERS = "clip", "orders"
NEAR_CLIP, NEAR_ORDERS = "clip, neighbours", "orders, neighbours"
ARMS = (CLIP, ORDERS, NEAR_CLIP, NEAR_ORDERS)
COMPARISONS: tuple[Pair, ...] = (
    (ORDERS, CLIP),
    (NEAR_ORDERS, CLIP),
    (NEAR_CLIP, CLIP),
    (NEAR_ORDERS, ORDERS),
    (NEAR_ORDERS, NEAR_CLIP),
)
PRIMARY = "R@10"
SECONDARY = {"photographs": "experts τ_c", "emojis": "nDCG@10"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a study."""

    name: str
    sizes: dict[str, tuple[int, int]]  # epochs and pairs of a batch, by data set
    smoothings: tuple[float, ...]
    lrs: tuple[float, ...]
    weights: tuple[float, ...]
    neighbours: tuple[int, ...]
    choice_seed: int
    seeds: tuple[int, ...]
    train_pictures: int  # photographs
    emojis: int | None


FULL = Plan(
    "full",
    sizes={"photographs": (20, 500), "emojis": (40, 128)},
    smoothings=(0.1, 0.2, 0.3),
    lrs=(5e-4, 1e-3),
    weights=(0.1, 0.3, 1.0),
    neighbours=(3, 10),
    choice_seed=950,
    seeds=tuple(range(5000, 5008)),
    train_pictures=6000,
    emojis=None,
)
QUICK = Plan(
    "quick",
    sizes={"photographs": (2, 100), "emojis": (2, 32)},
    smoothings=(0.2,),
    lrs=(1e-3,),
    weights=(0.3,),
    neighbours=(3,),
    choice_seed=0,
    seeds=(1, 2),
    train_pictures=500,
    emojis=240,
)
PLANS = {plan.name: plan for plan in (FULL, QUICK)}


def searches(plan: Plan, data: str, find: Find) -> dict[str, Search]:
    """Return every arm's tries, as far as they are known."""
    found: dict[str, Search] = {}
    for arm in ARMS:
        tries = _tries(plan, data, arm, {name: best(search) for name, search in found.items()})
        records = find(tries)
        found[arm] = {one: records[one]["metrics"][PRIMARY] if one in records else None for one in tries}
    return found


def _tries(plan: Plan, data: str, arm: str, chosen: Mapping[str, Setting | None]) -> list[Setting]:
    """Return an arm's tries, which start from the best settings of arms before it."""
    start = {
        CLIP: Setting(CLIP, plan.choice_seed, "choice", *plan.sizes[data]),
        NEAR_ORDERS: chosen.get(ORDERS),
    }.get(arm, chosen.get(CLIP))
    if start is None:
        return []
    first, second = {
        CLIP: (("label_smoothing", plan.smoothings), ("lr", plan.lrs)),
        ORDERS: (("weight", plan.weights), ("in_modal", (False, True))),
        NEAR_CLIP: (("neighbours", plan.neighbours), ("label_smoothing", plan.smoothings)),
        NEAR_ORDERS: (("neighbours", plan.neighbours), ("weight", plan.weights)),
    }[arm]
    return [
        dataclasses.replace(start, arm=arm, **{first[0]: a, second[0]: b})
        for a, b in itertools.product(first[1], second[1])
    ]


def arms(plan: Plan, found: Mapping[str, Search]) -> dict[str, list[Setting]]:
    """Return the trainings of every arm whose search is finished."""
    return {
        arm: [dataclasses.replace(one, seed=seed, side="test") for seed in plan.seeds]
        for arm, search in found.items()
        if (one := best(search)) is not None
    }
