"""The study: its data set with the trainings, and what its records say."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import open_clip

from studies import icons
from studies.plan import Best, Find, best_of
from studies.records import Record
from studies.report import conditions_texts, mean_text, test_cells, tries_row
from studies.runner import Study
from studies.statistics import Arms, Measure
from studies.training import kept

from . import task
from .task import Task
from .train import Setting, build, fine_tune, measure, pretrain

START = "start"
PLAIN, GENTLE, AVERAGED = "plain", "gentle", "averaged"
BASELINES, TEACHERS = (GENTLE, AVERAGED), ("mimicry", "ranks")
ARMS = (PLAIN, *BASELINES, *TEACHERS)
COMPARISONS = [*((arm, PLAIN) for arm in ARMS[1:]), *itertools.product(TEACHERS, BASELINES)]
KEPT, LEARNED, MEAN = MEASURES = [Measure(name, (name,)) for name in ("kept", "learned", "mean")]
PACKAGES = ("torch", "numpy", "open_clip_torch", "rankloss")
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A task, and the folder that keeps its starting checkpoints."""

    task: Task
    checkpoints: Path

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all pictures and captions."""
        return self.task.data

    def train(self, setting: Setting) -> Record:
        """Fine-tune and measure a setting."""
        part = self.task.parts[setting.side]
        start = self.start(setting)
        began = time.process_time()
        model = fine_tune(setting, start, part.new)
        trained = time.process_time()
        return {
            "metrics": {name: round(value, 4) for name, value in measure(model, part).items()},
            "items": {name: len(of.pictures) for name, of in self.task.pairs.items()},
            "processor_seconds": round(trained - began, 1),
        }

    def start(self, setting: Setting) -> open_clip.CLIP:
        """Return the seed's starting checkpoint, which is trained once and kept."""
        path = self.checkpoints / f"{self.fingerprint}-{setting.pretraining}-seed{setting.seed}.pt"
        state = kept(path, lambda: pretrain(setting.seed, setting.pretraining, self.task.old).state_dict())
        model = build(setting.seed)
        model.load_state_dict(state)
        return model.eval()


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, FineTuning]:
    """Return the data set; icons are built if they are missing."""
    built = icons.built(options.icons)
    pairs = task.read(built, pretrained=sizes.pretrained, held_out=sizes.held_out, emojis=sizes.emojis)
    return {"icons": FineTuning(pairs, options.output / "checkpoints")}


def searches(sizes: SimpleNamespace, find: Find) -> Iterator[Best]:
    """Yield every arm's tries with their scores: what is learned for plain fine-tuning, else the mean."""

    def of_rates(arm: str) -> list[Setting]:
        pairs = itertools.product(sizes.epochs, sizes.lrs[arm])
        return [Setting(arm, sizes.choice_seed, "choice", sizes.pretraining, *pair) for pair in pairs]

    plain = best_of(PLAIN, of_rates(PLAIN), find.scores(LEARNED))
    yield plain
    yield best_of(GENTLE, of_rates(GENTLE), find.scores(MEAN))
    around = functools.partial(dataclasses.replace, plain.chosen)
    yield best_of(AVERAGED, [around(arm=AVERAGED, share=x) for x in sizes.shares], find.scores(MEAN))
    for arm, loss in sizes.losses.items():
        tries = [around(arm=arm, loss=loss, weight=x) for x in sizes.weights[arm]]
        yield best_of(arm, tries, find.scores(MEAN))


def results(sizes: SimpleNamespace, finds: dict[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values: what is kept and learned is corrected together, their mean apart."""
    find = finds["icons"]
    found = list(searches(sizes, find))
    start = Setting(START, 0, "test", sizes.pretraining, epochs=0)
    arms = Arms(find.arms({START: start, **{one.arm: one.chosen for one in found}}, sizes.seeds))
    tests = arms.tests(COMPARISONS, [KEPT, LEARNED]) | arms.tests(COMPARISONS, [MEAN])

    def beats_both(arm: str) -> bool:
        ds = [tests[(arm, other), MEAN.title] for other in BASELINES]
        return all(d.established and d.mean > 0 for d in ds)

    seconds = {
        arm: fmean(one["processor_seconds"] for one in of.values()) for arm, of in arms.records.items()
    }
    return {
        "seeds": sizes.seeds,
        "beats": {arm: beats_both(arm) for arm in TEACHERS},
        "arms": [
            [f"`{arm}`", *(mean_text(arms.estimate(arm, m)) for m in MEASURES), f"{seconds[arm]:.1f} s"]
            for arm in arms.records
        ],
        "tests": [
            [
                f"`{arm}`",
                f"`{other}`",
                *(cell for m in MEASURES for cell in test_cells(tests[(arm, other), m.title])),
            ]
            for arm, other in COMPARISONS
        ],
        "tests_head": ["arm", "minus", *(cell for m in MEASURES for cell in (m.title, "p", ""))],
        "searches": [tries_row(one, _text) for one in found],
        "made": conditions_texts(arms.all),
    }


def _text(setting: Setting) -> str:
    parts = [f"{setting.epochs} epochs", f"{setting.lr:g}"]
    if setting.weight:
        parts.append(f"weight {setting.weight:g}")
    if setting.share < 1:
        parts.append(f"share {setting.share:g}")
    return ", ".join(parts)


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        _HERE,
        Setting,
        {"icons": "."},
        data,
        results,
        plan="plan.yaml",
        report="finetuning",
        packages=PACKAGES,
    )
