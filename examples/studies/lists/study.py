"""The study: its data sets with the trainings, and what their records say."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies.photographs import features, folder
from studies.photographs.heads import Heads
from studies.plan import Best, Find, best_of
from studies.records import Record
from studies.report import conditions_texts, marked, mean_text, test_row, tries_row
from studies.runner import Study
from studies.statistics import Arms, Difference, Measure, Pair

from . import emojis, photographs
from .losses import OPTIONS
from .task import Part, Task
from .train import CLIP, Setting, start, train

MODELS = tuple(OPTIONS)
BESIDE = {model: f"{model} beside {CLIP}" for model in MODELS}
ARMS = (CLIP, *MODELS, *BESIDE.values())
COMPARISONS = [
    *((arm, CLIP) for arm in ARMS[1:]),
    *itertools.combinations(MODELS, 2),
    *itertools.combinations(BESIDE.values(), 2),
    *((beside, model) for model, beside in BESIDE.items()),
]
TITLES = {"photographs": "People's grades of photographs' captions", "emojis": "Emojis graded by a rule"}
# The first is the primary one, by which settings are chosen.
MEASURES = {
    name: [Measure(title, (title,)) for title in titles]
    for name, titles in {
        "photographs": ("experts τ_c", "experts τ_b", "crowd nDCG@10", "R@10"),
        "emojis": ("nDCG@10", "τ_b", "R@10"),
    }.items()
}
_HERE = Path(__file__).parent


class Lists:
    """A task, and the heads that every arm of a seed starts from."""

    def __init__(self, task: Task) -> None:
        self.task, self.fingerprint = task, task.data
        self._started: dict[tuple[int, int], Heads] = {}

    def train(self, setting: Setting) -> Record:
        """Train and measure a setting on every division of its side."""
        parts = [self.task.choice] if setting.side == "choice" else list(self.task.tests)
        starts = [self._start(part, setting) for part in parts]
        began = time.process_time()
        found = [
            part.measure(train(setting, part, started)) for part, started in zip(parts, starts, strict=True)
        ]
        return {
            "metrics": {name: [round(of[name], 4) for of in found] for name in found[0]},
            "items": self.task.items,
            "processor_seconds": round(time.process_time() - began, 1),
        }

    def _start(self, part: Part, setting: Setting) -> Heads:
        key = setting.seed, id(part.pairs)
        if key not in self._started:
            self._started[key] = start(part.pairs, setting.seed, setting.start_epochs)
        return self._started[key]


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Lists]:
    """Return the data sets: the photographs where their folder is given, and the emojis."""
    found = {}
    if options.data is None:
        print(f"The photographs are left out: --data names their folder.\n{folder.WHERE}")
        print(f"Beside it: {folder.TEXTS}/{photographs.CROWD}")
    else:
        pictures = folder.read(options.data)
        cache = features.cached(pictures, sizes.train_pictures)
        found["photographs"] = Lists(photographs.task(pictures, cache, sizes.train_pictures))
    graded = emojis.task(options.output / "features", features.FrozenEncoders(), sizes.emojis)
    return {**found, "emojis": Lists(graded)}


def searches(sizes: SimpleNamespace, measure: Measure, find: Find) -> dict[str, Best]:
    """Return every arm's search; a model beside CLIP's loss is tried with the option that is best alone."""
    scores, found = find.scores(measure), {}

    def search(
        arm: str, options: Iterable[str], lrs: Iterable[float], weights: Iterable[float] = (1.0,)
    ) -> None:
        budget = {"epochs": sizes.epochs, "lists": sizes.lists, "start_epochs": sizes.start_epochs}
        tries = itertools.product(options, weights, lrs)
        found[arm] = best_of(
            arm,
            [Setting(arm, sizes.choice_seed, "choice", option, lr, w, **budget) for option, w, lr in tries],
            scores,
        )

    search(CLIP, sizes.smoothings, sizes.lrs)
    for model in MODELS:
        search(model, OPTIONS[model], sizes.lrs)
    for model, beside in BESIDE.items():
        weights = [sizes.units.get(model, 1.0) * weight for weight in sizes.weights]
        search(beside, [found[model].chosen.option], sizes.lrs[-2:], weights)
    return found


def results(sizes: SimpleNamespace, finds: dict[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values, of each data set that has records."""
    parts = [_values(sizes, name, finds[name]) for name in TITLES if name in finds]
    return {"parts": parts, "seeds": sizes.seeds, "models": MODELS, "beside": BESIDE, "clip": CLIP}


def _values(sizes: SimpleNamespace, name: str, find: Find) -> dict[str, Any]:
    primary, *others = measures = MEASURES[name]
    found = searches(sizes, primary, find)
    arms = Arms(find.arms({arm: one.chosen for arm, one in found.items()}, sizes.seeds))
    tests = {pair: d for (pair, _), d in arms.tests(COMPARISONS, [primary]).items()}
    secondary = arms.tests([(arm, CLIP) for arm in ARMS[1:]], others)
    seconds = fmean(record["processor_seconds"] for record in arms.all)
    items = sorted({", ".join(f"{k} {v:,}" for k, v in record["items"].items()) for record in arms.all})
    return {
        "title": TITLES[name],
        "primary": primary.title,
        "groups": {
            where: _best(arms, primary, tests, list(group))
            for where, group in (("Alone", MODELS), ("Beside CLIP's loss", BESIDE.values()))
        },
        "signs": {sign: [arm for arm in ARMS[1:] if _sign(tests, arm, CLIP) == sign] for sign in (1, 0, -1)},
        "differences": tests,
        "searches": [tries_row(one, _text) for one in found.values()],
        "arms": [[f"`{arm}`", *(mean_text(arms.estimate(arm, m)) for m in measures)] for arm in ARMS],
        "arms_head": ["arm", *(m.title for m in measures)],
        "tests": [test_row(pair, d) for pair, d in tests.items()],
        "others": [
            [f"`{arm}`", *(marked(secondary[(arm, CLIP), m.title]) for m in others)] for arm in ARMS[1:]
        ],
        "others_head": ["minus `clip`", *(m.title for m in others)],
        "conditions": [
            ["records of the test", f"{len(arms.all)}, {seconds:.1f} s of one core each"],
            *(["data", one] for one in items),
            *(["made with", kind] for kind in conditions_texts(arms.all)),
        ],
    }


def _sign(tests: dict[Pair, Difference], arm: str, other: str) -> int:
    """Return the sign of a difference, either way round; 0 where it is not established."""
    turned = (arm, other) not in tests
    d = tests[(other, arm) if turned else (arm, other)]
    sign = 0 if not d.established else 1 if d.mean > 0 else -1
    return -sign if turned else sign


def _best(
    arms: Arms, primary: Callable[..., Any], tests: dict[Pair, Difference], group: list[str]
) -> dict[str, Any]:
    """Return the arm with the largest mean, those of its group that do not differ from it, and the others.

    ``least`` is the smallest difference to another one of the group.
    """
    first = max(group, key=lambda arm: arms.estimate(arm, primary).mean)
    rest = [arm for arm in group if arm != first]
    equals = [arm for arm in rest if _sign(tests, first, arm) != 1]
    least = min(abs(d.mean) for pair, d in tests.items() if first in pair and {*pair} <= {*group})
    return {"first": first, "equals": equals, "below": [x for x in rest if x not in equals], "least": least}


def _text(setting: Setting) -> str:
    weight = f", weight {setting.weight:g}" if setting.arm in BESIDE.values() else ""
    option = f"smoothing {setting.option}" if setting.arm == CLIP else setting.option
    return f"{option}, {setting.lr:g}{weight}"


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        _HERE, Setting, {name: name for name in TITLES}, data, results, plan="plan.yaml", report="lists"
    )
