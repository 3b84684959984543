"""Studies: arms with equally many tries each, the best of each confirmed once, by a plan fixed before.

An arm is a search of its own. What a study adds: all arms are confirmed with the same seeds, their tests are
corrected together, and nothing is concluded before every planned record is there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from statsmodels.stats.power import TTestPower

from miniature_paper import grid
from miniature_paper.grid import Setting, model_config
from miniature_paper.records import Store
from miniature_paper.statistics import ALPHA, Difference, correct, paired_difference

from .confirmation import Declarations
from .ladder import Find, Step, climb, winner
from .objective import SCORES, diverged
from .trials import (
    LOSS,
    RECALL,
    RECIPE,
    REFERENCE,
    SIZES,
    TEST,
    Attempt,
    Round,
    Search,
    Size,
    Trial,
    attempts,
)

RESULTS = Path(__file__).resolve().parents[2] / "results"
_CONTENT = yaml.safe_load(Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of arms."""

    name: str
    size: str  # full or quick
    title: str
    arms: dict[str, Search]  # by name; all have the same rounds and confirmation
    score: str  # what the tests that count are about, one of objective.SCORES
    rival: str | None  # an arm that every other is compared with, as well as with plain CLIP
    teacher: Attempt | None  # a model that is trained first, and whose rankings some arms follow
    spread: Spread | None  # what the number of seeds was computed from

    @property
    def confirmation(self) -> Round:
        """How the winners are confirmed."""
        return next(iter(self.arms.values())).confirmation

    @property
    def grid(self) -> grid.Preset:
        """Pairs, batch size and limits."""
        return next(iter(self.arms.values())).grid


@dataclasses.dataclass(frozen=True)
class Spread:
    """How many seeds a difference takes, given earlier paired differences between the same two losses."""

    differences: tuple[float, ...]
    difference: float  # to be told from zero
    power: float

    @property
    def deviation(self) -> float:
        """The standard deviation of the earlier differences."""
        mean = sum(self.differences) / len(self.differences)
        return math.sqrt(sum((x - mean) ** 2 for x in self.differences) / (len(self.differences) - 1))

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
        names = {LOSS: RECIPE.name, REFERENCE: REFERENCE}
        return [Attempt(names[loss], loss, (), full.epochs(full.pairs), seed, TEST, "full") for loss in names]

    differences = []
    for folder, seeds, pair in (("full", grid_seeds, settings), ("search", search_seeds, tried)):
        store = Store(RESULTS / folder)
        for seed in seeds:
            records, _ = store.of(pair(seed))
            if len(records) != 2:
                raise ValueError(f"{store.path}: seed {seed}, which a plan rests on, has no pair of records")
            differences.append(score(records[0]) - score(records[1]))
    return Spread(tuple(differences), difference, power)


def teacher_folder(teacher: Attempt) -> str:
    """Return the teacher's folder below the output: its name follows from everything that trains it."""
    job = teacher.job()
    content = [model_config(teacher.backbone), job.arguments, teacher.pairs]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    return f"teachers/{teacher.name}-{digest}"


def _register(name: str, size: str) -> tuple[str, Attempt | None]:
    """Add a study's sizes, by which its records are read; return the size's name and the teacher."""
    own, label, teacher = _CONTENT[name][size], f"{name}-{size}", None
    preset = grid.PRESETS[own["size"]["preset"]]
    if "teacher" in own:
        spec = own["teacher"]
        # Trained like its students, on more pairs and for longer; measured like them.
        taught = f"{label}-teacher"
        SIZES[taught] = Size(dataclasses.replace(preset, name=taught, pairs=spec["pairs"]), whole=True)
        teacher = Attempt("teacher", REFERENCE, (), spec["epochs"], spec["seed"], TEST, taught, "teacher")
    pairs, folder = own["size"]["pairs"], teacher_folder(teacher) if teacher else None
    SIZES[label] = Size(dataclasses.replace(preset, name=label, pairs=pairs), whole=True, teacher=folder)
    return label, teacher


def load(name: str, size: str) -> Study:
    """Return a study as ``studies.yaml`` has it.

    Raises:
        ValueError: If the arms do not have equally many tries.
    """
    content = _CONTENT[name]
    own, (label, teacher) = content[size], _register(name, size)
    folder = SIZES[label].teacher
    filled = {"{teacher}": folder or "", "{texts}": f"{folder}/texts-{own['size']['pairs']}.npz"}

    def trial(arm: str, title: str, entries: Mapping[str, str]) -> Trial:
        changes = [(flag, value) for flag, value in entries.items() if flag != "loss"]
        for word, meant in filled.items():
            changes = [(flag, value.replace(word, meant)) for flag, value in changes]
        return Trial(f"{arm}-{title}", arm, tuple(changes), entries.get("loss", LOSS))

    seeds, spread = own["confirmation"]["seeds"], None
    if isinstance(seeds, dict):
        earlier = tuple(seeds["grid"]), tuple(seeds["search"])
        spread = earlier_spread(*earlier, seeds["difference"], seeds["power"])
        seeds = range(seeds["first"], seeds["first"] + spread.seeds)
    rounds = tuple(Round(one["epochs"], tuple(one["seeds"]), one["keep"]) for one in own["rounds"])
    confirmation = Round(own["confirmation"]["epochs"], tuple(seeds), 1)
    arms = {}
    for arm in own.get("arms", content["arms"]):
        tries = list(content["arms"][arm].items())[: own.get("tries")]
        arms[arm] = Search(label, "", tuple(trial(arm, *one) for one in tries), rounds, 0, confirmation)
    if len({len(search.trials) for search in arms.values()}) != 1:
        raise ValueError(f"{name}: every arm must have equally many tries")
    return Study(name, size, content["title"], arms, content["score"], content.get("rival"), teacher, spread)


STUDIES = tuple(_CONTENT)
SIZE_NAMES = ("full", "quick")
for _name in STUDIES:
    for _size in SIZE_NAMES:
        _register(_name, _size)


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far a study is."""

    steps: dict[str, list[Step]]  # the rounds of every arm
    winners: dict[str, Trial | None]

    @property
    def due(self) -> list[Attempt]:
        """The trainings of the rounds that every arm is in; those that arms share once."""
        missing = (steps[-1].missing for steps in self.steps.values() if steps)
        return list(dict.fromkeys(one for of in missing for one in of))


def standing(study: Study, find: Find) -> Standing:
    """Return the arms' rounds and winners, as far as the records reach."""
    steps = {arm: climb(search, find) for arm, search in study.arms.items()}
    return Standing(steps, {arm: winner(study.arms[arm], found) for arm, found in steps.items()})


def declare(study: Study, found: Standing, results: Path, find: Find) -> dict[str, Trial]:
    """Record what is confirmed, before its first training; another winner later on is refused.

    Raises:
        SecondConfirmationError: If another try of an arm was declared.
    """
    declared = {}
    for arm, best in found.winners.items():
        assert best is not None
        declared[arm] = Declarations(results / arm).declare(study.arms[arm], best, find).trial
    return declared


def needed(study: Study, winners: Mapping[str, Trial]) -> list[Attempt]:
    """Return the trainings of the confirmation, seed by seed."""
    first = next(iter(study.arms.values()))
    one = study.confirmation
    return attempts(first, list(winners.values()), one.epochs, one.seeds, TEST)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A confirmation of all arms."""

    values: dict[str, dict[int, Mapping[str, Any]]]  # records by arm and seed; plain CLIP is an arm, too
    lost: tuple[str, ...]  # arms in which a model diverged: they are in no comparison
    tests: dict[tuple[str, str], Difference]  # in the study's score, by arm and what it is compared with


def outcome(study: Study, winners: Mapping[str, Trial], find: Find) -> Outcome | None:
    """Return the comparison of the arms; None as long as a record is missing."""
    wanted = needed(study, winners)
    records = find(wanted)
    if any(a not in records for a in wanted):
        return None
    names = {REFERENCE: REFERENCE, **{trial.name: arm for arm, trial in winners.items()}}
    values: dict[str, dict[int, Mapping[str, Any]]] = {arm: {} for arm in (REFERENCE, *winners)}
    for one in wanted:
        values[names[one.trial]][one.seed] = records[one]
    lost = tuple(arm for arm, of in values.items() if any(diverged(record) for record in of.values()))
    pairs = [(arm, REFERENCE) for arm in winners]
    if study.rival:
        pairs += [(arm, study.rival) for arm in winners if arm != study.rival]
    kept = [pair for pair in pairs if not {*pair} & {*lost}]
    tests = {pair: compared(values, pair, SCORES[study.score]) for pair in kept}
    return Outcome(values, lost, correct({pair: d for pair, d in tests.items() if d is not None}))


def compared(values: Mapping[str, Mapping[int, Any]], pair: tuple[str, str], score: Any) -> Difference | None:
    """Return the paired difference between two arms in a score."""
    return paired_difference(*({seed: score(record) for seed, record in values[arm].items()} for arm in pair))
