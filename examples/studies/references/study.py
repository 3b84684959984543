"""The study: its data sets with the trainings, and what their records say."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch

from rankloss import RankedLists
from studies.lists import emojis, photographs
from studies.lists.photographs import recall_of
from studies.lists.task import Part, Task
from studies.lists.train import CLIP, start
from studies.photographs.features import FrozenEncoders, Side, cached, standardised
from studies.photographs.folder import needed, read
from studies.photographs.heads import Heads
from studies.plan import Find
from studies.records import Record
from studies.report import conditions_texts, marked, mean_text
from studies.runner import Study
from studies.statistics import Arms, Difference, Measure, correct

from .train import BESIDE, REFERENCE, Setting, train

LISTED = {"photographs": Measure("experts τ_c", ("experts τ_c",)), "emojis": Measure("nDCG@10", ("nDCG@10",))}
RECALL = Measure("R@10", ("R@10",))
MODELS = ("plackett_luce", "pairwise", "lambda")
ALONE = tuple(model + reference for model in MODELS for reference in ("", REFERENCE))
LISTS = (*ALONE, *(arm + BESIDE for arm in ALONE))
COMPARISONS = [
    *((arm, CLIP) for arm in LISTS),
    *((arm, arm.replace(REFERENCE, "")) for arm in LISTS if REFERENCE in arm),
]
Key = tuple[str, tuple[str, str], str]  # data set, an arm minus another, measure


def build(name: str, model: str) -> RankedLists:
    """Return a data set's loss of lists, with the options that were chosen in the study of lists."""
    by_difference = model == "pairwise" and name == "photographs"
    return RankedLists(model=model, pair_weight="difference" if by_difference else None)


class Taught:
    """A task, and the heads that every arm of a seed starts from."""

    def __init__(self, name: str, task: Task, sizes: SimpleNamespace) -> None:
        self.name, self.task, self.sizes, self.fingerprint = name, task, sizes, task.data
        self._started: dict[tuple[int, int], Heads] = {}

    def train(self, setting: Setting) -> Record:
        """Train and measure a setting on every division of its side."""
        parts = [self.task.choice] if setting.side == "choice" else list(self.task.tests)
        began, found = time.process_time(), []
        for part in parts:
            started, (model, _, _) = self._start(part, setting.seed), setting.arm.partition(" ")
            loss = None if setting.arm == CLIP else build(self.name, model)
            budget = {"epochs": self.sizes.epochs, "size": self.sizes.lists}
            found.append(part.measure(train(setting, part, started, loss, **budget)))
        return {
            "metrics": {name: [round(of[name], 4) for of in found] for name in found[0]},
            "items": self.task.items,
            "processor_seconds": round(time.process_time() - began, 1),
        }

    def _start(self, part: Part, seed: int) -> Heads:
        key = seed, id(part.pairs)
        if key not in self._started:
            self._started[key] = start(part.pairs, seed, self.sizes.start_epochs).eval()
        return self._started[key]


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Taught]:
    """Return both tasks; features that are missing are computed."""
    pictures = read(needed(options.data))
    cache = cached(pictures, sizes.train_pictures, FrozenEncoders)
    sides = standardised({side: cache.side(of) for side, of in pictures.used(sizes.train_pictures).items()})
    tasks = {
        "photographs": halved(photographs.task(pictures, cache, sizes.train_pictures), sides["dev"]),
        "emojis": emojis.task(options.output / "features", FrozenEncoders(), sizes.emojis),
    }
    return {name: Taught(name, task, sizes) for name, task in tasks.items()}


def halved(task: Task, dev: Side) -> Task:
    """Return a task whose R@10 is that of one half of the dev pictures for the choice, of the other else."""
    middle = len(dev.pictures) // 2
    halves = [Side(dev.pictures[rows], dev.sentences[rows]) for rows in (slice(middle), slice(middle, None))]

    def part(of: Part, half: Side) -> Part:
        def measure(model: Heads) -> dict[str, float]:
            with torch.inference_mode():
                return {**of.measure(model), RECALL.title: recall_of(model, half)}

        return dataclasses.replace(of, measure=measure)

    tests = tuple(part(one, halves[1]) for one in task.tests)
    return dataclasses.replace(task, choice=part(task.choice, halves[0]), tests=tests)


# --- the choice of settings ---


def tries(sizes: SimpleNamespace, name: str, arm: str, worth: float) -> list[Setting]:
    """Return the tries of an arm; beside CLIP's loss ``worth`` is the one best alone."""
    if arm == CLIP:
        points = [(1.0, 1.0, sizes.clip_lrs[name])]
    elif arm in ALONE:
        points = list(itertools.product(sizes.worths, [1.0], sizes.lrs))
    else:
        points = list(itertools.product([worth], sizes.weights, sizes.lrs_beside))
    return [Setting(arm, sizes.choice_seeds[0], "choice", lr, w, weight) for w, weight, lr in points]


def best(tried: Mapping[Setting, tuple[float, float]], recall: float, allowed: float) -> Setting:
    """Return the best try: the largest measure of lists where R@10 is not below CLIP's by more than allowed.

    Without such a try it is the largest sum of the measure of lists and R@10.
    """
    kept = {one: of[0] for one, of in tried.items() if of[1] >= recall - allowed}
    ranked = kept or {one: sum(of) for one, of in tried.items()}
    return max(ranked, key=ranked.__getitem__)


def choose(sizes: SimpleNamespace, name: str, find: Find) -> dict[str, Setting]:
    """Return every arm's setting, by the means of both measures over the seeds of choice."""
    chosen: dict[str, Setting] = {}
    recall = 0.0
    for arm in (CLIP, *LISTS):
        alone = chosen.get(arm.removesuffix(BESIDE))
        tried = tries(sizes, name, arm, alone.worth if alone else 1.0)
        with_seeds = {
            one: [dataclasses.replace(one, seed=seed) for seed in sizes.choice_seeds] for one in tried
        }
        records = find([one for of in with_seeds.values() for one in of])

        def mean(of: Sequence[Setting], measure: Callable[[Record], float], records: Any = records) -> float:
            return fmean(measure(records[one]) for one in of)

        found = {one: (mean(of, LISTED[name]), mean(of, RECALL)) for one, of in with_seeds.items()}
        if arm == CLIP:
            recall = found[tried[0]][1]
        chosen[arm] = best(found, recall, sizes.allowed)
    return chosen


# --- tests ---


def tests(arms: Mapping[str, Arms]) -> dict[Key, Difference]:
    """Return all planned differences of both data sets, paired by seed, corrected by Holm together."""
    return correct(
        {
            (name, pair, measure.title): arms[name].difference(pair, measure)
            for name, pair in itertools.product(LISTED, COMPARISONS)
            for measure in (LISTED[name], RECALL)
        }
    )


def answers(sizes: SimpleNamespace, found: Mapping[Key, Difference], name: str) -> list[str]:
    """Return the arms that answer the question with yes."""
    kept = []
    for arm in LISTS:
        lists, pairs = (found[name, (arm, CLIP), m.title] for m in (LISTED[name], RECALL))
        gains = lists.established and lists.mean >= sizes.gain
        if gains and pairs.mean >= 0 and pairs.low > -sizes.margin:
            kept.append(arm)
    return kept


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values."""
    chosen, arms = {}, {}
    for name in LISTED:
        find = finds.get(name, Find(name, {}))
        chosen[name] = choose(sizes, name, find)
        arms[name] = Arms(find.arms(chosen[name], sizes.seeds))
    found = tests(arms)
    return {
        "seeds": sizes.seeds,
        "gain": sizes.gain,
        "tests": len(found),
        "parts": [
            {
                "name": name,
                "head": _head(LISTED[name]),
                "rows": [_row(name, one, arms[name], found) for one in chosen[name].values()],
                "answers": answers(sizes, found, name),
            }
            for name in LISTED
        ],
        "made": conditions_texts(record for of in arms.values() for record in of.all),
    }


def _head(listed: Measure) -> list[str]:
    both = (listed.title, RECALL.title)
    return ["arm", "chosen", *both, *(f"{m} − clip" for m in both), *(f"{m} − without" for m in both)]


def _row(name: str, one: Setting, arms: Arms, found: Mapping[Key, Difference]) -> list[str]:
    both, others = (LISTED[name], RECALL), (CLIP, one.arm.replace(REFERENCE, ""))
    return [
        f"`{one.arm}`",
        f"{one.lr:g}, × {one.worth:g}, weight {one.weight:g}",
        *(mean_text(arms.estimate(one.arm, m)) for m in both),
        *(marked(found.get((name, (one.arm, other), m.title))) for other in others for m in both),
    ]


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="plan.yaml",
        records={name: name for name in LISTED},
        data=data,
        results=results,
        report="references",
    )
