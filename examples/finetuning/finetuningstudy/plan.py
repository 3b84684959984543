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

START = "start"
PLAIN, GENTLE, AVERAGED = "plain", "gentle", "averaged"
MIMICRY, RANKS = "mimicry", "ranks"
BASELINES, TEACHERS = (GENTLE, AVERAGED), (MIMICRY, RANKS)
ARMS = (PLAIN, *BASELINES, *TEACHERS)
COMPARISONS: tuple[Pair, ...] = (
    *((arm, PLAIN) for arm in ARMS[1:]),
    *itertools.product(TEACHERS, BASELINES),
)
KEPT, LEARNED, MEAN = MEASURES = "kept", "learned", "mean"
PRIMARY = (KEPT, LEARNED)
_LOSSES = {MIMICRY: "mimicry", RANKS: "rankclip-distill"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a study."""

    name: str
    pretraining: int  # epochs on the icons
    pretrained: int  # icons
    held_out: int  # icons, of either side
    emojis: int | None
    epochs: tuple[int, ...]
    lrs: dict[str, tuple[float, ...]]
    weights: dict[str, tuple[float, ...]]
    shares: tuple[float, ...]
    choice_seed: int
    seeds: tuple[int, ...]


FULL = Plan(
    "full",
    pretraining=2,
    pretrained=30_000,
    held_out=500,
    emojis=None,
    epochs=(5, 10),
    lrs={PLAIN: (3e-4, 1e-3, 3e-3), GENTLE: (3e-5, 1e-4, 3e-4)},
    weights={MIMICRY: (0.5, 1, 2, 4, 8, 16), RANKS: (1, 2, 4, 8, 16, 32)},
    shares=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    choice_seed=960,
    seeds=tuple(range(6000, 6008)),
)
QUICK = Plan(
    "quick",
    pretraining=1,
    pretrained=640,
    held_out=50,
    emojis=300,
    epochs=(1,),
    lrs={PLAIN: (1e-3,), GENTLE: (1e-4,)},
    weights={MIMICRY: (8,), RANKS: (64,)},
    shares=(0.5,),
    choice_seed=0,
    seeds=(1, 2),
)
PLANS = {plan.name: plan for plan in (FULL, QUICK)}


def searches(plan: Plan, find: Find) -> dict[str, Search]:
    """Return every arm's tries with their scores: what is learned for plain fine-tuning, else the mean."""
    found: dict[str, Search] = {}
    for arm in ARMS:
        tries = _tries(plan, arm, best(found.get(PLAIN, {})))
        records, measure = find(tries), LEARNED if arm == PLAIN else MEAN
        found[arm] = {one: records[one]["metrics"][measure] if one in records else None for one in tries}
    return found


def _tries(plan: Plan, arm: str, plain: Setting | None) -> list[Setting]:
    if arm in plan.lrs:
        return [
            Setting(arm, plan.choice_seed, "choice", plan.pretraining, epochs, lr)
            for epochs, lr in itertools.product(plan.epochs, plan.lrs[arm])
        ]
    if plain is None:
        return []
    if arm == AVERAGED:
        return [dataclasses.replace(plain, arm=arm, share=share) for share in plan.shares]
    return [
        dataclasses.replace(plain, arm=arm, loss=_LOSSES[arm], weight=weight) for weight in plan.weights[arm]
    ]


def tests(plan: Plan, found: Mapping[str, Search]) -> dict[str, list[Setting]]:
    """Return the test's trainings: of the starting checkpoints, and of each arm whose search is finished."""
    chosen = {arm: one for arm, search in found.items() if (one := best(search)) is not None}
    chosen = {START: Setting(START, 0, "test", plan.pretraining, epochs=0), **chosen}
    return {
        arm: [dataclasses.replace(one, seed=seed, side="test") for seed in plan.seeds]
        for arm, one in chosen.items()
    }
