"""Losses of graded lists with and without a frozen model's scores: what lists teach, and what is forgotten.

The plan is ``plan.md`` beside this file. The command does the missing trainings, and writes ``report.md``
once all are there; nothing is tested before.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.statistics import Difference, correct, estimate, paired_difference
from examples_common.terminal import say, status_of
from examples_common.trainings import Trainings, finder
from examples_common.wording import conditions_texts, marked, mean_text, write_report
from liststudy import emojis, photographs
from liststudy.photographs import recall_of
from liststudy.task import Part, Task
from liststudy.train import PAIRS, SMOOTHING, start
from photostudy import losses
from photostudy.features import Cache, FrozenEncoders, Side, standardised
from photostudy.folder import read
from photostudy.heads import Heads
from rich.console import Console
from torch import Tensor

from rankloss import RankedLists

HERE = Path(__file__).parent
SETS = ("photographs", "emojis")
LISTED = {"photographs": "experts τ_c", "emojis": "nDCG@10"}  # the measure of lists
RECALL = "R@10"
MODELS = ("plackett_luce", "pairwise", "lambda")
CLIP, REFERENCE, BESIDE = "clip", " − reference", " beside clip"
ALONE = tuple(model + reference for model in MODELS for reference in ("", REFERENCE))
LISTS = (*ALONE, *(arm + BESIDE for arm in ALONE))
CHOICE_SEEDS = (7200, 7201)
SEEDS = tuple(range(7210, 7222))
# Of CLIP's loss alone, as they were chosen in the study of lists.
CLIPS_RATE = {"photographs": 1e-4, "emojis": 1e-3}
WORTHS, RATES = (0.25, 1.0), (1e-4, 3e-4, 1e-3)
WEIGHTS, RATES_BESIDE = (1 / 16, 1 / 4, 1.0, 4.0), (3e-4, 1e-3)
ALLOWED = 0.5  # points of R@10 below CLIP's that a choice may have
GAIN, MARGIN = 1.5, 1.0  # of the question: a gain on lists; R@10's interval ends above minus the margin
_EPOCHS, _LISTS, _START_EPOCHS, _CEILING = 3, 200, 15, 100.0
_PACKAGES = {name: name for name in ("torch", "numpy", "scipy", "rankloss")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str  # CLIP, or a name of LISTS
    seed: int
    side: str  # "choice" or "test"
    lr: float
    worth: float = 1.0  # multiplies scores, those of the reference too
    weight: float = 1.0  # of the lists' term beside CLIP's


def build(name: str, model: str) -> RankedLists:
    """Return a data set's loss of lists, with the options that were chosen in the study of lists."""
    if model == "pairwise" and name == "photographs":
        return RankedLists(model=model, pair_weight="difference")
    return RankedLists(model=model)


def changed(model: str, grades: Tensor) -> Tensor:
    """Return the grades as a model takes them: for Plackett–Luce those of 0 are unranked."""
    return grades.masked_fill(grades == 0, -math.inf) if model == "plackett_luce" else grades


# --- trainings ---


def train(setting: Setting, name: str, part: Part, started: Heads) -> Heads:
    """Train heads further, and return them in evaluation mode.

    A seed gives every arm the same batches of lists and of pairs. Every arm makes as many steps.
    """
    torch.manual_seed(setting.seed)
    of_lists, of_pairs = (torch.Generator().manual_seed(setting.seed) for _ in range(2))
    model = copy.deepcopy(started).train()
    ranked = None if setting.arm == CLIP else of_arm(setting, name, started)
    has_clip = ranked is None or setting.arm.endswith(BESIDE)
    contrast = losses.build(CLIP, label_smoothing=SMOOTHING) if has_clip else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.0, fused=True)
    steps = len(part.lists.pictures) // _LISTS
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * steps)
    for _ in range(_EPOCHS):
        order = torch.randperm(len(part.lists.pictures), generator=of_lists)
        for rows in order.split(_LISTS)[:steps]:
            value = torch.zeros(())
            if ranked is not None:
                value = setting.weight * ranked(model, part, rows)
            if contrast is not None:
                drawn = torch.randperm(len(part.pairs.pictures), generator=of_pairs)[:PAIRS]
                which = torch.randint(part.pairs.sentences.shape[1], drawn.shape, generator=of_pairs)
                v = model.pictures(part.pairs.pictures[drawn])
                t = model.sentences(part.pairs.sentences[drawn, which])
                value = value + contrast(v, t, logit_scale=model.log_scale.exp())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            decay.step()
            with torch.no_grad():
                model.log_scale.clamp_(0.0, math.log(_CEILING))
    return model.eval()


def of_arm(setting: Setting, name: str, started: Heads) -> Callable[[Heads, Part, Tensor], Tensor]:
    """Return the lists' term of a model, a part and the numbers of its lists."""
    model, _, _ = setting.arm.partition(" ")
    loss, has_reference = build(name, model), REFERENCE in setting.arm

    def term(heads: Heads, part: Part, rows: Tensor) -> Tensor:
        lists = part.lists[rows]
        needed, index = lists.index.unique(return_inverse=True)
        given = {"candidate_index": index, "mask": lists.mask}
        if has_reference:
            with torch.no_grad():
                v, t = started.pictures(lists.pictures), started.sentences(part.candidates[needed])
                scores = (started.log_scale.exp() * v @ t.T).gather(1, index)
            given["reference_scores"] = setting.worth * scores
        v, t = heads.pictures(lists.pictures), heads.sentences(part.candidates[needed])
        grades = changed(model, lists.grades)
        value: Tensor = loss(v, t, grades, setting.worth * heads.log_scale.exp(), **given)
        return value

    return term


@dataclasses.dataclass(frozen=True)
class Study(Trainings):
    """A task and the records of its trainings."""

    name: str
    task: Task
    store: Store
    locks: Path
    _started: dict[int, Heads] = dataclasses.field(default_factory=dict)

    @property
    def data(self) -> str:
        """Fingerprint of the task's data."""
        return self.task.data

    def record(self, setting: Setting) -> Record:
        """Train and measure a setting, and return its record."""
        parts = [self.task.choice] if setting.side == "choice" else list(self.task.tests)
        began, found = time.process_time(), []
        for part in parts:
            key = hash((setting.seed, id(part.pairs)))
            if key not in self._started:
                self._started[key] = start(part.pairs, setting.seed, _START_EPOCHS).eval()
            found.append(part.measure(train(setting, self.name, part, self._started[key])))
        return {
            "setting": dataclasses.asdict(setting),
            "metrics": {name: [round(of[name], 4) for of in found] for name in found[0]},
            "chance": {},
            "items": self.task.items,
            "data": self.task.data,
            "processor_seconds": round(time.process_time() - began, 1),
            "conditions": conditions(_PACKAGES, threads=torch.get_num_threads()),
        }


# --- the choice of settings ---

Find = Callable[[Sequence[Setting]], Mapping[Setting, Record]]


def tries(name: str, arm: str, worth: float = 1.0) -> list[Setting]:
    """Return the tries of an arm with the first seed; beside CLIP's loss ``worth`` is the one best alone."""
    seed = CHOICE_SEEDS[0]
    if arm == CLIP:
        return [Setting(arm, seed, "choice", CLIPS_RATE[name])]
    if arm in ALONE:
        return [Setting(arm, seed, "choice", lr, worth=w) for w, lr in itertools.product(WORTHS, RATES)]
    return [
        Setting(arm, seed, "choice", lr, worth=worth, weight=weight)
        for weight, lr in itertools.product(WEIGHTS, RATES_BESIDE)
    ]


def with_seeds(setting: Setting, side: str, seeds: Sequence[int]) -> list[Setting]:
    """Return a setting with each of the seeds."""
    return [dataclasses.replace(setting, side=side, seed=seed) for seed in seeds]


def scores(name: str, setting: Setting, find: Find) -> tuple[float, float] | None:
    """Return a try's measure of lists and its R@10, means over the seeds of choice; None if unknown."""
    records = find(with_seeds(setting, "choice", CHOICE_SEEDS)).values()
    if len(records) < len(CHOICE_SEEDS):
        return None
    of_lists, of_pairs = (fmean(fmean(r["metrics"][m]) for r in records) for m in (LISTED[name], RECALL))
    return of_lists, of_pairs


def best(tried: Mapping[Setting, tuple[float, float]], recall: float) -> Setting:
    """Return the best try: the largest measure of lists where R@10 is not below CLIP's by more than allowed.

    Without such a try it is the largest sum of the measure of lists and R@10.
    """
    kept = {one: of[0] for one, of in tried.items() if of[1] >= recall - ALLOWED}
    ranked = kept or {one: sum(of) for one, of in tried.items()}
    return max(ranked, key=ranked.__getitem__)


def _nothing(_title: str, _settings: list[Setting]) -> None:
    """Do no training."""


def choose(
    name: str, find: Find, do: Callable[[str, list[Setting]], None] | None = None
) -> dict[str, Setting]:
    """Return every arm's setting; ``do`` does trainings that are missing.

    Raises:
        RuntimeError: If a training is missing.
    """
    chosen: dict[str, Setting] = {}
    recall = 0.0
    for arm in (CLIP, *LISTS):
        alone = chosen.get(arm.removesuffix(BESIDE))
        tried = tries(name, arm, alone.worth if alone and arm != CLIP else 1.0)
        if do is not None:
            do(
                f"{name}: tries of {arm}",
                [one for of in tried for one in with_seeds(of, "choice", CHOICE_SEEDS)],
            )
        found = {one: of for one in tried if (of := scores(name, one, find)) is not None}
        if len(found) < len(tried):
            raise RuntimeError(f"{name}: tries of {arm} are missing")
        if arm == CLIP:
            recall = found[tried[0]][1]
        chosen[arm] = best(found, recall)
    return chosen


def planned(chosen: Mapping[str, Setting]) -> list[Setting]:
    """Return the trainings of the test, seed by seed."""
    return [one for seed in SEEDS for of in chosen.values() for one in with_seeds(of, "test", [seed])]


# --- tests ---

Key = tuple[str, str, str, str]  # data set, arm, the arm that is subtracted, measure


def comparisons() -> list[tuple[str, str]]:
    """Return the tested differences: each arm minus CLIP, each reference minus the same without."""
    return [
        *((arm, CLIP) for arm in LISTS),
        *((arm, arm.replace(REFERENCE, "")) for arm in LISTS if REFERENCE in arm),
    ]


def tests(values: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]) -> dict[Key, Difference]:
    """Return all planned differences, paired by seed, corrected by Holm over all of them.

    ``values`` are by data set, arm, seed and measure.
    """
    found = {}
    for name, (arm, other) in itertools.product(SETS, comparisons()):
        for measure in (LISTED[name], RECALL):
            of = ({seed: x[measure] for seed, x in values[name][one].items()} for one in (arm, other))
            found[name, arm, other, measure] = paired_difference(*of)
    return correct(found)


def answers(found: Mapping[Key, Difference], name: str) -> list[str]:
    """Return the arms that answer the question with yes."""
    kept = []
    for arm in LISTS:
        lists, pairs = (found[name, arm, CLIP, measure] for measure in (LISTED[name], RECALL))
        if lists.established and lists.mean >= GAIN and pairs.mean >= 0 and pairs.low > -MARGIN:
            kept.append(arm)
    return kept


def write(finds: Mapping[str, Find]) -> Path:
    """Write the report of all records.

    Raises:
        RuntimeError: If a training is missing.
    """
    chosen = {name: choose(name, finds[name]) for name in SETS}
    records = {name: finds[name](planned(chosen[name])) for name in SETS}
    if missing := sum(len(planned(chosen[name])) - len(records[name]) for name in SETS):
        raise RuntimeError(f"{missing} trainings are missing: nothing is reported yet")
    values: dict[str, dict[str, dict[int, dict[str, float]]]] = {name: {} for name in SETS}
    for name, of in records.items():
        for one, record in of.items():
            metrics = {measure: fmean(x) for measure, x in record["metrics"].items()}
            values[name].setdefault(one.arm, {})[one.seed] = metrics
    found = tests(values)
    parts = []
    for name in SETS:
        both = (LISTED[name], RECALL)
        means = {
            arm: [estimate([x[measure] for x in values[name][arm].values()]) for measure in both]
            for arm in (CLIP, *LISTS)
        }
        rows = [
            [
                f"`{arm}`",
                f"{one.lr:g}, × {one.worth:g}, weight {one.weight:g}",
                *(mean_text(x, len(SEEDS)) for x in means[arm]),
                *(marked(found.get((name, arm, CLIP, m))) for m in both),
                *(marked(found.get((name, arm, arm.replace(REFERENCE, ""), m))) for m in both),
            ]
            for arm, one in chosen[name].items()
        ]
        head = ["arm", "chosen", *both, *(f"{m} − clip" for m in both), *(f"{m} − without" for m in both)]
        parts.append({"name": name, "head": head, "rows": rows, "answers": answers(found, name)})
    made = conditions_texts(one for of in records.values() for one in of.values())
    return write_report(
        HERE / "report.md", HERE / "template.md", parts=parts, tests=len(found), seeds=len(SEEDS), made=made
    )


# --- the command ---


def halved(task: Task, dev: Side) -> Task:
    """Return a task whose R@10 is that of one half of the dev pictures for the choice, of the other else."""
    middle = len(dev.pictures) // 2
    halves = [Side(dev.pictures[rows], dev.sentences[rows]) for rows in (slice(middle), slice(middle, None))]

    def part(of: Part, half: Side) -> Part:
        def measure(model: Heads) -> dict[str, float]:
            with torch.inference_mode():
                return {**of.measure(model), RECALL: recall_of(model, half)}

        return dataclasses.replace(of, measure=measure)

    tests = tuple(part(one, halves[1]) for one in task.tests)
    return dataclasses.replace(task, choice=part(task.choice, halves[0]), tests=tests)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing trainings, and write the report once all are there."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="the folder of Flickr8k, with its features")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/references"), help="of features and locks"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if not args.report_only and args.data is None:
        parser.error("argument --data: needed")
    stores = {name: Store(HERE / name) for name in SETS}

    def run(console: Console) -> int:
        if not args.report_only:
            torch.set_num_threads(1)  # sums keep one order
            tasks = {"photographs": of_photographs(args.data)}
            tasks["emojis"] = emojis.task(args.output / "features", FrozenEncoders())
            for name in SETS:
                study = Study(name, tasks[name], stores[name], args.output / "locks")
                chosen = choose(name, study.find, lambda title, of, study=study: study.do(title, of, console))
                study.do(f"{name}: test", planned(chosen), console)
        say(console, str(write({name: finder(stores[name], Setting) for name in SETS})))
        return 0

    return status_of(run)


def of_photographs(folder: Path) -> Task:
    """Return the task of photographs, whose features are there."""
    pictures = read(folder)
    cache = Cache(pictures, FrozenEncoders.name)
    sides = standardised({side: cache.side(of) for side, of in pictures.used(6000).items()})
    return halved(photographs.task(pictures, cache, 6000), sides["dev"])


if __name__ == "__main__":
    sys.exit(main())
