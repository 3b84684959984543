"""The plans of parts 2b and 3, as their pages have them: the arms, the tries, the seeds, the comparisons.

Nothing here trains or draws a random number: the same records lead to the same settings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from photostudy import plan as part1
from photostudy import students
from photostudy.plan import Changes, Find, Search
from photostudy.students.plan import Choice, Pair, Point

from .setting import Setting
from .teacher import Ensemble

CLIP = "clip"
BOTH, MIMICRY, RANKS = "mimicry-and-ranks", "mimicry", "ranks"
Grid = dict[str, Point]  # fields of Setting with the values that are tried


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss in a view, and its tries."""

    view: str
    loss: str
    grid: Grid


_SCALED: Grid = {"weight": (1.0, 4.0), "scale": (10.0, 20.0, 40.0)}
FEATURES: dict[str, Arm] = {
    MIMICRY: Arm("features", MIMICRY, {"weight": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)}),
    "contrast": Arm("features", "contrast", {"weight": (0.5, 2.0), "scale": (10.0, 20.0, 40.0)}),
    RANKS: Arm("features", RANKS, {"weight": (16.0, 64.0), "top_k": (4, 8, 16)}),
    "softmax": Arm("features", "softmax", _SCALED),
    BOTH: Arm("features", BOTH, {}),  # around the winners of both: see choice
}

_RANKED: Grid = {"weight": (0.0625, 0.25), "top_k": (4, 16)}
_SOFTMAX: Grid = {"weight": (0.25, 1.0), "scale": (10.0, 30.0)}
_ROWS: Grid = {"weight": (1.0, 4.0), "scale": (10.0, 30.0)}
_WEIGHT: Grid = {"weight": (0.25, 1.0, 4.0, 16.0)}
_OF_VIEWS: dict[str, dict[str, Grid]] = {
    "scores": {RANKS: _RANKED, "softmax": _SOFTMAX, "pearson": _ROWS, "squares": _WEIGHT},
    "sharpened": {"softmax": _SOFTMAX, "squares": _WEIGHT},
    "saturated": {"softmax": _SOFTMAX, "squares": _WEIGHT},
    "4 bits": {RANKS: _RANKED, "softmax": _SOFTMAX, "squares": _WEIGHT},
    "ten ids": {RANKS: _WEIGHT, "soft-labels": _WEIGHT},
    "separate": {
        RANKS: {"weight": (1.0, 4.0), "top_k": (4, 16)},
        "softmax": _SOFTMAX,
        "cka": _WEIGHT,
        "projected-mimicry": {"weight": (1.0, 4.0, 16.0, 64.0)},
    },
    "reranker": {RANKS: _WEIGHT, "pairwise": _WEIGHT},
    "reranker with scores": {"softmax": _ROWS},
}
VIEWS: dict[str, Arm] = {
    f"{view}: {loss}": Arm(view, loss, grid) for view, of in _OF_VIEWS.items() for loss, grid in of.items()
}
# Ranks of these views are those of another: the same order, or the same lists.
SAME = {"sharpened": "scores", "saturated": "scores", "reranker with scores": "reranker"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arms and sizes of a part."""

    part: str
    name: str
    arms: Mapping[str, Arm]
    heads: part1.Plan  # of the search that chooses the heads' setting
    teacher: tuple[int, ...]  # seeds
    weak: int  # seed of the model by which sentences are hard
    try_seed: int
    best_seeds: tuple[int, ...]
    tries: int
    rounds: int
    seeds: tuple[int, ...]  # of the test side

    @property
    def comparisons(self) -> list[Pair]:
        """The tested differences: each arm minus CLIP, then minus the ranks of its view."""
        rest = [name for name in self.arms if self.arms[name].loss != RANKS]
        return [*((name, CLIP) for name in self.arms), *((name, self.ranks_of(name)) for name in rest)]

    def ranks_of(self, name: str) -> str:
        """Return the arm of ranks of an arm's view."""
        view = self.arms[name].view
        return RANKS if view == "features" else f"{SAME.get(view, view)}: {RANKS}"

    def ensemble(self, base: Changes) -> Ensemble:
        """Return the teacher's trainings."""
        return Ensemble(base, self.teacher, self.weak)


_TEACHER = tuple(range(920, 926))
_FULL = functools.partial(Plan, name="full", heads=part1.FULL, teacher=_TEACHER, weak=926)
_QUICK = functools.partial(
    Plan, name="quick", heads=part1.QUICK, teacher=(0, 1), weak=2, try_seed=0, best_seeds=(0,), tries=1,
    rounds=0, seeds=(1, 2),
)  # fmt: skip
PLANS: dict[str, dict[str, Plan]] = {
    "2b": {
        "full": _FULL(
            "2b", arms=FEATURES, try_seed=930, best_seeds=(931, 932), tries=6, rounds=3,
            seeds=tuple(range(3000, 3008)),
        ),
        "quick": _QUICK("2b", arms=FEATURES),
    },
    "3": {
        "full": _FULL(
            "3", arms=VIEWS, try_seed=940, best_seeds=(940, 941), tries=4, rounds=1,
            seeds=tuple(range(3100, 3108)),
        ),
        "quick": _QUICK("3", arms=VIEWS),
    },
}  # fmt: skip


def of_heads(plan: Plan, find: Find) -> Search:
    """Return part 1's search of plain CLIP's setting, which the teacher and every student have."""
    return part1.search(plan.heads, CLIP, find)


def choice(plan: Plan, name: str, base: Changes, find: Find) -> Choice:
    """Follow an arm's tries, by the rule of part 2a.

    Those of mimicry and ranks together lie around the winners of both.
    """
    arm, changes = plan.arms[name], {**base, "view": plan.arms[name].view}
    grid = arm.grid
    if name == BOTH:
        mimicry, ranks = (choice(plan, other, base, find) for other in (MIMICRY, RANKS))
        if not (mimicry.chosen and ranks.chosen):
            return Choice({}, None, (*mimicry.due, *ranks.due), ("mimicry", "weight"))
        w, most = mimicry.chosen["weight"], ranks.chosen["weight"]
        grid = {"mimicry": (w / 2, w), "weight": (most / 4, most / 2, most)}
        changes["top_k"] = ranks.chosen["top_k"]
    return students.plan.choice(plan, arm.loss, changes, find, grid, Setting)


def choices(plan: Plan, base: Changes, find: Find) -> dict[str, Choice]:
    """Return every arm's choice, as far as the records reach."""
    return {name: choice(plan, name, base, find) for name in plan.arms}


def settings(plan: Plan, base: Changes, chosen: Mapping[str, Choice]) -> dict[str, list[Setting]]:
    """Return the trainings on the test side of CLIP and of the arms; none of an arm without a choice."""

    def of(loss: str, changes: Mapping[str, Any] | None) -> list[Setting]:
        return [] if changes is None else [Setting(loss, seed, "test", **changes) for seed in plan.seeds]

    arms = {name: of(plan.arms[name].loss, one.chosen) for name, one in chosen.items()}
    return {CLIP: of(CLIP, base), **arms}
