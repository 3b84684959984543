"""Comparisons that were fixed before their first training: rounds of tries, and one confirmation.

A study has arms with equally many tries each. The tries of an arm go through rounds on the validation side;
the best one of every arm is confirmed once on the test side, all of them with the same seeds. Every try is
the recipe with some of the trainer's arguments changed, and is compared with plain CLIP that has the same
changes as far as they concern CLIP, which is the batch size.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from itertools import chain, combinations, product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies.plan import Find
from studies.runner import Study
from studies.statistics import Arms, Difference, Pair, correct

from . import ladder_report, scores
from .settings import PACKAGES, PLANS, PRESETS, Attempt, size_of
from .trainings import Miniature

LOSS, REFERENCE, SETTING = "rankclip", "clip", "setting"
VALIDATION, TEST = "validation", "test"
OBJECTIVE, RECALL = "objective", "R@10, both ways"
_HERE = Path(__file__).parent


# --- the scores of the rounds ---


def recall_at_10(record: Mapping[str, Any]) -> float:
    """R@10, the mean of both directions."""
    metrics = record["metrics"]
    found = metrics["retrieval"] if "retrieval" in metrics else metrics["retrieval/test"]
    return (found["image_to_text R@10"] + found["text_to_image R@10"]) / 2


def _sets(record: Mapping[str, Any]) -> dict[str, float]:
    found = {task: of for task, of in record["metrics"].items() if task.startswith("zero-shot/")}
    shifts = scores.SHIFTS.values()
    return {task: of["top-1"] for task, of in found.items() if task.partition("/")[2] not in shifts}


def zero_shot(record: Mapping[str, Any]) -> float:
    """Top-1 over all labelled pictures."""
    sets = _sets(record)
    items = {name: record["items"][name] for name in sets}
    return sum(items[name] * score for name, score in sets.items()) / sum(items.values())


# The objective first, then its parts, then what is reported beside it; templates/objective.md says why.
SCORES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    OBJECTIVE: lambda record: (recall_at_10(record) + zero_shot(record)) / 2,
    RECALL: recall_at_10,
    "zero-shot top-1, all pictures": zero_shot,
    "zero-shot top-1, mean of sets": lambda record: fmean(_sets(record).values()),  # as in Table 1
}


# --- tries ---


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting that is tried."""

    name: str
    factor: str  # what it varies; levels of one factor exclude each other
    changes: tuple[tuple[str, str], ...] = ()  # the trainer's arguments that differ from the recipe's
    loss: str = LOSS

    @property
    def command(self) -> str:
        """The changed arguments as they are typed."""
        return " ".join(word for change in self.changes for word in change)

    @property
    def clip(self) -> Trial:
        """Plain CLIP with the changes that it shares."""
        shared = tuple(change for change in self.changes if change[0] == "--batch-size")
        name = "-".join([REFERENCE, *(f"{flag.strip('-')}-{value}" for flag, value in shared)])
        return Trial(name, "", shared, REFERENCE)

    def __add__(self, other: Trial) -> Trial:
        """Both settings at once."""
        changes = tuple(sorted(self.changes + other.changes))
        return Trial(f"{self.name}+{other.name}", f"{self.factor} + {other.factor}", changes)


RECIPE = Trial("recipe", "none")


@dataclasses.dataclass(frozen=True)
class Grid:
    """An arm whose tries are all combinations of some values, and which can be continued beyond them."""

    arm: str
    given: dict[str, str]  # arguments that all tries share, and "loss"
    axes: dict[
        str, Sequence[float]
    ]  # by the flags, which have the same value: each so many times the one before
    bounds: Mapping[str, Sequence[float]]

    def trial(self, values: Iterable[float]) -> Trial:
        """Return the try with one value for each axis."""
        words = [f"{value:g}" for value in values]
        varied = (
            (flag, word) for flags, word in zip(self.axes, words, strict=True) for flag in flags.split()
        )
        return Trial(
            "-".join([self.arm, *words]), self.arm, (*_changes(self.given), *varied), self.given["loss"]
        )

    @property
    def trials(self) -> list[Trial]:
        """The tries to begin with."""
        return list(map(self.trial, product(*self.axes.values())))

    def beside(self, trial: Trial) -> list[Trial]:
        """Return the tries that differ from one by a step along one axis, tried or not."""
        changes, found = dict(trial.changes), []
        here = [float(changes[flags.split()[0]]) for flags in self.axes]
        for number, (flags, values) in enumerate(self.axes.items()):
            ratio, (low, high) = values[1] / values[0], self.bounds.get(flags, (0.0, math.inf))
            for other in (here[number] / ratio, here[number] * ratio):
                if low <= other <= high:
                    found.append(self.trial([*here[:number], other, *here[number + 1 :]]))
        return found


def _changes(entries: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((flag, value) for flag, value in entries.items() if flag != "loss")


def combine(helped: Sequence[Trial], limit: int) -> list[Trial]:
    """Combine settings of different factors that helped, given the most helpful first.

    Every combination of two and more of the first ``limit``, and all of them together if there are more.
    """
    first = sorted(helped[:limit], key=lambda trial: trial.name)
    groups = [group for size in range(2, len(first) + 1) for group in combinations(first, size)]
    if len(helped) > limit:
        groups.append(tuple(sorted(helped, key=lambda trial: trial.name)))
    return [reduce(Trial.__add__, group) for group in groups]


# --- the plan ---


def load(name: str, preset: str) -> SimpleNamespace:
    """Return a study as ``studies.yaml`` has it: with its tries by arm, its rounds and its confirmation."""
    content, own = PLANS[name], PLANS[name][preset]
    label = f"{name}-{preset}" if "pairs" in own["size"] else preset
    common, wanted = size_of(label), own.get("tries")
    groups = content.get("factors") or content["arms"]
    filled = {"{teacher}": common.teacher["folder"]} if common.teacher else {}
    for kind, ending in {"texts": "npz", "features": "npz", "components": "npy", "sentences": "npz"}.items():
        filled[f"{{{kind}}}"] = f"{filled.get('{teacher}')}/{kind}-{common.pairs}.{ending}"

    def meant(entries: Mapping[str, str]) -> dict[str, str]:
        return {
            flag: reduce(lambda text, of: text.replace(*of), filled.items(), value)
            for flag, value in entries.items()
        }

    arms: dict[str, list[Trial]] = {}
    grids: dict[str, Grid] = {}
    for arm in own.get("arms", groups):
        if "values" in groups[arm]:
            given = meant(groups[arm]["given"])
            grids[arm] = Grid(arm, given, groups[arm]["values"], content.get("bounds", {}))
            arms[arm] = grids[arm].trials
        else:
            named = {
                (title if "factors" in content else f"{arm}-{title}", title): meant(of)
                for title, of in groups[arm].items()
            }
            arms[arm] = [
                Trial(full, arm, _changes(of), of.get("loss", LOSS))
                for (full, title), of in named.items()
                if not wanted or title in wanted
            ]
        if arm in grids and wanted:
            arms[arm] = [one for one in arms[arm] if one.name in wanted]
    if "factors" in content:
        arms = {SETTING: list(chain(*arms.values()))}
    teacher = common.teacher and Attempt(
        "teacher",
        REFERENCE,
        (),
        common.teacher["epochs"],
        common.teacher["seed"],
        TEST,
        f"{label}-teacher",
        "teacher",
    )
    return SimpleNamespace(
        **{"note": "", "caution": "", "extensions": 0, "spread": None, **own},
        **{name: content.get(name) for name in ("title", "score", "rival")},
        name=name,
        preset=preset,
        label=label,
        size_of=common,
        teacher_attempt=teacher,
        tries_of=arms,
        grids=grids,
        combined=content.get("combined", 0),
        rivals=[arm for arm in content.get("rivals", ()) if arm in arms],
        together=content.get("together", {}),
    )


def attempts(plan: Any, trials: Iterable[Trial], one: Mapping[str, Any], side: str) -> list[Attempt]:
    """Return every training that a comparison of these tries needs, seed by seed, plain CLIP first."""
    trials = list(trials)
    every = [*(trial.clip for trial in trials), *trials]
    made = (_attempt(plan, trial, one["epochs"], seed, side) for seed in one["seeds"] for trial in every)
    return list(dict.fromkeys(made))


def _attempt(plan: Any, trial: Trial, epochs: int, seed: int, side: str) -> Attempt:
    return Attempt(trial.name, trial.loss, trial.changes, epochs, seed, side, plan.label)


class Comparison(Arms):
    """Records of tries, by the names they have here, and of the plain CLIP that each is compared with."""

    def __init__(
        self, plan: Any, trials: Mapping[str, Trial], one: Mapping[str, Any], side: str, find: Find
    ) -> None:
        self.trials = trials
        self.clip = {name: trial.clip.name for name, trial in trials.items()}
        records = find(attempts(plan, trials.values(), one, side))
        every = {trial.clip.name: trial.clip for trial in trials.values()} | dict(trials)

        def of(trial: Trial, seed: int) -> Mapping[str, Any]:
            return records[_attempt(plan, trial, one["epochs"], seed, side)]

        super().__init__(
            {name: {seed: of(trial, seed) for seed in one["seeds"]} for name, trial in every.items()}
        )
        # Models of which a seed diverged are excluded from every comparison.
        self.lost = [name for name, of in self.records.items() if any(one["diverged"] for one in of.values())]

    def difference(self, pair: Pair, read: Any) -> Difference | None:
        """Return the paired difference to another one, or to a try's own plain CLIP; None if one is lost."""
        pair = pair[0], self.clip[pair[0]] if pair[1] == REFERENCE else pair[1]
        return None if {*pair} & {*self.lost} else super().difference(pair, read)


# --- the rounds ---


@dataclasses.dataclass(frozen=True)
class Standing:
    """A try after a round."""

    trial: Trial
    clip: Any  # the estimate of plain CLIP's score
    differences: dict[str, Difference]  # to plain CLIP in every score; empty if it diverged
    worth: float  # the key of the order of tries; one that diverged is below every other


@dataclasses.dataclass(frozen=True)
class Step:
    """An arm in a round."""

    round: Mapping[str, Any]
    trials: Sequence[Trial]
    standings: Sequence[Standing]  # the best first

    @property
    def kept(self) -> list[Trial]:
        """The tries that continue."""
        return [one.trial for one in self.standings[: self.round["keep"]] if one.differences]


def stand(plan: Any, trials: Sequence[Trial], one: Mapping[str, Any], find: Find) -> Step:
    """Compare tries with plain CLIP, seed by seed; equal ones are ordered by name.

    Raises:
        ValueError: If plain CLIP diverged: then nothing can be compared with it.
    """
    comparison = Comparison(plan, {trial.name: trial for trial in trials}, one, VALIDATION, find)
    found = []
    for trial in trials:
        clip = comparison.clip[trial.name]
        if clip in comparison.lost:
            raise ValueError(f"plain CLIP, which {trial.name} is compared with, diverged")
        ds = {name: comparison.difference((trial.name, REFERENCE), score) for name, score in SCORES.items()}
        known = {name: d for name, d in ds.items() if d is not None}
        worth = known[plan.score].mean if known else -math.inf
        found.append(Standing(trial, comparison.estimate(clip, SCORES[plan.score]), known, worth))
    return Step(one, trials, sorted(found, key=lambda standing: (-standing.worth, standing.trial.name)))


def climb(plan: Any, arm: str, find: Find) -> list[Step]:
    """Return an arm's rounds.

    In a round whose best try has neighbours in its arm's grid that were never tried, these join it. After the
    first round the best levels of the factors that did better than the recipe are combined.
    """
    trials, steps = list(plan.tries_of[arm]), list[Step]()
    tried, most = list(trials), len(trials) + plan.extensions
    for number, one in enumerate(plan.rounds):
        step = stand(plan, trials, one, find)
        while arm in plan.grids and (new := _neighbours(plan.grids[arm], step, tried, most)):
            tried += new
            step = stand(plan, [*step.trials, *new], one, find)
        steps.append(step)
        new = combine(_helped(step), plan.combined) if number == 0 and plan.combined else []
        trials = list(dict.fromkeys([*([RECIPE] if plan.combined else []), *step.kept, *new]))
    return steps


def _neighbours(grid: Grid, step: Step, tried: Sequence[Trial], most: int) -> list[Trial]:
    beside = grid.beside(step.kept[0]) if step.kept else []
    return [one for one in beside if one not in tried][: max(most - len(tried), 0)]


def _helped(step: Step) -> list[Trial]:
    """Return the best level of every factor that did better than the recipe, the most helpful first."""
    recipe = next(one for one in step.standings if one.trial == RECIPE)
    best: dict[str, Trial] = {}
    for one in step.standings:
        if one.worth > recipe.worth:
            best.setdefault(one.trial.factor, one.trial)
    return list(best.values())


def _together(plan: Any, arm: str, winners: Mapping[str, Trial], worth: Mapping[str, float]) -> Grid:
    """Return the grid of an arm made of others' winners, of a quarter, half and all of their weights."""
    one = plan.together[arm]
    best = sorted(plan.rivals, key=lambda name: (-worth[name], name))[: one["best"]]
    given: dict[str, str] = {}
    weights = [next(iter(plan.grids[name].axes)) for name in best]
    for name in best:
        given |= dict(winners[name].changes)
    if beside := one.get("beside"):
        found = dict(winners[beside].changes)
        given |= {here: found[there] for there, here in one["renamed"].items()}
        weights.append(next(iter(one["renamed"].values())))
    first, second = (float(given.pop(flag)) for flag in weights)
    axes = {weights[0]: (first / 4, first / 2, first), weights[1]: (second / 2, second)}
    return Grid(arm, {"loss": winners[best[0]].loss, **given}, axes, {})


def rounds(plan: Any, find: Find) -> tuple[dict[str, list[Step]], dict[str, Trial]]:
    """Return the arms' rounds and winners; arms made of others' winners join the plan."""
    steps: dict[str, list[Step]] = {}
    winners: dict[str, Trial] = {}
    for arm in [*plan.tries_of, *plan.together]:
        if arm in plan.together:
            if not {*plan.rivals, *filter(None, [plan.together[arm].get("beside")])} <= winners.keys():
                continue
            worth = {name: steps[name][-1].standings[0].worth for name in plan.rivals}
            plan.grids[arm] = _together(plan, arm, winners, worth)
            plan.tries_of[arm] = plan.grids[arm].trials
        steps[arm] = climb(plan, arm, find)
        if steps[arm] and not steps[arm][-1].kept:
            raise ValueError(f"{arm}: every try of the last round diverged, so there is no winner")
        winners[arm] = steps[arm][-1].kept[0] if steps[arm] else plan.tries_of[arm][0]
    return steps, winners


# --- the confirmation ---


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The one look at the test side: every arm's winner against plain CLIP, with fresh seeds."""

    comparison: Comparison
    tests: dict[Pair, Difference]  # the primary tests, in the study's score, corrected together
    others: dict[tuple[Pair, str], Difference]  # the secondary ones, by measure, corrected together
    measures: list[scores.Measure]  # the secondary measures; empty: SCORES


def confirm(plan: Any, winners: Mapping[str, Trial], find: Find) -> Outcome:
    """Compare the winners; the recipe, where it is trained along, is in secondary comparisons alone."""
    along = {RECIPE.name: RECIPE} if plan.combined else {}
    trials = {**winners, **({} if RECIPE in winners.values() else along)}
    comparison = Comparison(plan, trials, plan.confirmation, TEST, find)
    pairs = [(name, REFERENCE) for name in trials]
    if plan.rival in trials:
        pairs += [(name, plan.rival) for name in trials if name != plan.rival]
    counted = [pair for pair in pairs if not {*pair} & {*along}]
    whole = plan.size_of.whole
    measures = _measures(plan, comparison) if whole else []
    tests = {pair: comparison.difference(pair, SCORES[plan.score]) for pair in counted}
    read = {one.name: one for one in measures} or SCORES
    others = {
        (pair, name): comparison.difference(pair, score)
        for pair in (pairs[: len(winners)] if whole else pairs)
        for name, score in read.items()
        if whole or name != plan.score or pair not in counted
    }
    tests, others = (correct({key: d for key, d in of.items() if d is not None}) for of in (tests, others))
    return Outcome(comparison, tests, others, measures)


def _measures(plan: Any, comparison: Comparison) -> list[scores.Measure]:
    """Return the measures that all models have, without the one that is tested."""
    kept = [of for name, of in comparison.records.items() if name not in comparison.lost]
    records = [record for of in kept for record in of.values()]
    tasks = sorted(set.intersection(*(set(record["metrics"]) for record in records))) if records else []
    sets = [name for name in scores.LABELLED_SETS if f"zero-shot/{name}" in tasks]
    probed = [name for name in scores.LABELLED_SETS if f"probe/{name}" in tasks]
    found = [*map(scores.retrieval_both_ways, scores.RECALLS), *scores.zero_shot(sets), *scores.shifts(tasks)]
    found += [*scores.mean_probe(probed), *scores.geometry(), *scores.agreement()]
    tested = scores.retrieval_both_ways("R@10") if plan.score == RECALL else None
    return [m for m in found if m != tested and all(m(one) is not None for one in records)]


# --- the study ---


def study(name: str) -> Study:
    """Return a study."""
    own = name.removeprefix("miniature-")

    def data(plan: SimpleNamespace, options: argparse.Namespace) -> dict[str, Miniature]:
        # All sizes of the preset, so that the studies share the pictures on the disk.
        return {"icons": Miniature(options, PRESETS[options.preset].sizes, plan.teacher_attempt)}

    def results(plan: SimpleNamespace, finds: Mapping[str, Find], _: object) -> dict[str, Any]:
        find = finds["icons"]
        teacher = [*find([plan.teacher_attempt]).values()] if plan.teacher_attempt else []
        steps, winners = rounds(plan, find)
        return ladder_report.values(plan, steps, winners, confirm(plan, winners, find), find, teacher)

    return Study(
        _HERE,
        Attempt,
        {"icons": own},
        data,
        results,
        plan=partial(load, own),
        report=own,
        template="templates/study.md",
        packages=PACKAGES,
    )
