"""The plan of part 1, as preregistration-part1.md has it: the tries, the arms, the seeds.

Nothing here trains or draws a random number: the same records lead to the same settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from examples_common.records import Record

from .heads import Setting
from .measure import BOTH_WAYS

Find = Callable[[Sequence[Setting]], Mapping[Setting, Record]]
Changes = dict[str, Any]  # fields of Setting

TUNED = ("clip", "rankclip")  # the losses whose settings are chosen, with the same tries
COMPONENTS = ("rankclip-cross", "rankclip-in", "rankclip-constant")
# In this order: the best level of a factor is kept while the next one is tried.
FACTORS: dict[str, tuple[float, ...]] = {
    "dropout": (0.1, 0.5, 0.6),
    "lr": (5e-4, 2e-3),
    "weight_decay": (0.5,),
    "batch_size": (250, 1000),
    "label_smoothing": (0.1, 0.2),
    "scale_ceiling": (12.0,),
    "scale_start": (5.0,),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a study."""

    name: str
    start: Changes  # where every search starts
    factors: dict[str, tuple[float, ...]]
    tuning_seeds: tuple[int, int]  # every try; those ahead with the first, and the one they are compared with
    seeds: tuple[int, ...]  # of the arms
    control_seeds: tuple[int, ...]  # of the controls: the first of these seeds


FULL = Plan("full", {}, FACTORS, (900, 901), tuple(range(1000, 1020)), tuple(range(1000, 1010)))
QUICK = Plan("quick", {"train_pictures": 1000, "batch_size": 250, "epochs": 3}, {}, (0, 1), (0, 1), ())
PLANS = {plan.name: plan for plan in (FULL, QUICK)}


@dataclasses.dataclass(frozen=True)
class Try:
    """A level of a factor, with its score on the dev side by seed."""

    factor: str
    level: float
    scores: tuple[float, ...]  # R@10, of one seed, or of both
    taken: bool


@dataclasses.dataclass(frozen=True)
class Search:
    """A loss's search, as far as the records reach."""

    loss: str
    chosen: Changes  # the setting so far
    score: float | None  # the mean of its scores on the dev side; None where nothing was searched
    tries: tuple[Try, ...]
    due: tuple[Setting, ...]  # trainings that are missing for the next step; empty: the search is finished


def score(record: Record) -> float:
    """Return a record's primary measure."""
    return float(record["metrics"]["retrieval"][BOTH_WAYS])


class MissingError(Exception):
    """Trainings of a search that have no record."""

    def __init__(self, settings: tuple[Setting, ...]) -> None:
        self.settings = settings


def search(plan: Plan, loss: str, find: Find, kind: Callable[..., Any] = Setting) -> Search:
    """Follow a loss's search through its factors; ``kind`` is the class of its settings.

    Of each factor every other level is tried with the first seed. Those ahead of the setting so far, and this
    one, are trained with the second seed; the best mean is kept, the setting so far where means are equal.
    """
    found = Search(loss, dict(plan.start), None, (), ())
    try:
        for factor in plan.factors:
            found = _next(plan, found, factor, find, kind)
        if not plan.factors:
            return found
        scores = _scores(find, [kind(loss, seed, "dev", **found.chosen) for seed in plan.tuning_seeds])
        return dataclasses.replace(found, score=fmean(scores.values()))
    except MissingError as missing:
        return dataclasses.replace(found, due=missing.settings)


def _next(plan: Plan, so_far: Search, factor: str, find: Find, kind: Callable[..., Any]) -> Search:
    """Return the search after a factor."""
    levels = plan.factors[factor]
    here = getattr(kind(so_far.loss, 0, "dev", **so_far.chosen), factor)
    at = {level: {**so_far.chosen, factor: level} for level in (here, *levels)}
    trials = {
        level: [kind(so_far.loss, seed, "dev", **changes) for seed in plan.tuning_seeds]
        for level, changes in at.items()
    }
    scores = _scores(find, [first for first, _ in trials.values()])
    ahead = [level for level in levels if scores[trials[level][0]] > scores[trials[here][0]]]
    if ahead:
        scores |= _scores(find, [one for level in (here, *ahead) for one in trials[level]])
    means = {level: fmean(scores[one] for one in trials[level]) for level in ahead}
    best = max(ahead, key=means.__getitem__, default=here)
    if ahead and means[best] <= fmean(scores[one] for one in trials[here]):
        best = here
    tried = (
        Try(factor, level, tuple(scores[one] for one in trials[level] if one in scores), level == best)
        for level in levels
    )
    return dataclasses.replace(so_far, chosen=at[best], tries=(*so_far.tries, *tried))


def _scores(find: Find, settings: Sequence[Setting]) -> dict[Setting, float]:
    """Return the scores of trainings.

    Raises:
        MissingError: If some have no record.
    """
    records = find(settings)
    if missing := tuple(one for one in settings if one not in records):
        raise MissingError(missing)
    return {one: score(record) for one, record in records.items()}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss in a setting."""

    name: str
    loss: str
    changes: Changes | None  # None: not known before a search is finished
    seeds: tuple[int, ...]

    def settings(self) -> list[Setting]:
        """Return the arm's trainings, measured on the test side."""
        if self.changes is None:
            return []
        return [Setting(self.loss, seed, "test", **self.changes) for seed in self.seeds]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference that is tested."""

    arm: str
    reference: str


def equal_scale(plan: Plan, of_clip: Search, find: Find) -> float:
    """Return the mean of the scales that plain CLIP's trainings on the dev side end with; else its start."""
    settings = [Setting("clip", seed, "dev", **of_clip.chosen) for seed in plan.tuning_seeds]
    ends = [record["metrics"]["geometry"]["logit_scale"] for record in find(settings).values()]
    return round(fmean(ends), 1) if ends else settings[0].scale_start


def arms(plan: Plan, of_clip: Search, of_rankclip: Search, find: Find) -> dict[str, Arm]:
    """Return the arms by name, in the order in which they are trained.

    Args:
        plan: The sizes.
        of_clip: Plain CLIP's finished search.
        of_rankclip: RankCLIP's, as far as it is.
        find: Finds the records of plain CLIP's search, which has the scale of the controls.
    """
    own, other = of_clip.chosen, None if of_rankclip.due else of_rankclip.chosen
    scale = equal_scale(plan, of_clip, find)
    found = [
        Arm("clip", "clip", own, plan.seeds),
        Arm("rankclip", "rankclip", own, plan.seeds),
        *([] if own == other else [Arm("rankclip-tuned", "rankclip", other, plan.seeds)]),
        *(Arm(name, name, own, plan.seeds) for name in COMPONENTS),
    ]
    epochs = Setting("clip", 0, "test", **own).epochs
    fixed = {"scale_start": scale, "scale_ceiling": max(scale, 100.0), "scale_fixed": True}
    for name, changes in (
        ("the pilot's setting", plan.start),
        ("twice the epochs", {**own, "epochs": 2 * epochs}),
        ("equal scale", {**own, **fixed}),
        ("half the epochs", {**own, "epochs": max(1, epochs // 2)}),
    ):
        found += [Arm(f"{loss}, {name}", loss, changes, plan.control_seeds) for loss in TUNED]
    return {arm.name: arm for arm in found}


def comparisons(arms: Mapping[str, Arm]) -> list[Comparison]:
    """Return the tested differences: arms minus plain CLIP, controls minus their own plain CLIP."""
    found = []
    for name, arm in arms.items():
        _, comma, control = name.partition(", ")
        reference = f"clip{comma}{control}"
        if arm.loss != "clip":
            found.append(Comparison(name, reference))
    return found


def in_order(arms: Mapping[str, Arm]) -> list[Setting]:
    """Return the trainings, seed by seed within each stage: the two losses, RankCLIP's own, and so on."""
    stages: dict[str, list[Setting]] = {}
    for name, arm in arms.items():
        alone = "components" if name in COMPONENTS else name if name == "rankclip-tuned" else ""
        stage = name.partition(", ")[2] or alone
        stages.setdefault(stage, []).extend(arm.settings())
    found = [one for stage in stages.values() for one in sorted(stage, key=lambda one: one.seed)]
    return list(dict.fromkeys(found))
