"""The study: the order of its trainings, the tests of its plan, and the report's values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies.cells import Tested, mean_rows, primary_values, rows
from studies.plan import Find, MissingError
from studies.records import Record
from studies.report import conditions_texts, test_cells
from studies.runner import Study
from studies.statistics import Arms, Measure, Pair, correct, paired_difference
from studies.students.measure import CORRELATION, PRIMARY

from .data import SECOND, VENDOR, data
from .train import Setting

_HERE = Path(__file__).parent
SETS = ("emojis", "icons", "icons-71680", "photographs", VENDOR)
PRIMARY_TESTS: dict[str, Pair] = {
    "a": ("spread", "clip"),
    "b": ("rankclip", "spread"),
    "c": ("rankclip-spread", "spread"),
    "d": ("encoders-spread", "spread"),
    "e": ("encoders", "encoders-shuffled"),
}
SECONDARY: list[Pair] = [
    ("captions", "spread"),
    ("captions", "captions-shuffled"),
    ("encoders-spread", "encoders"),
    ("one-space", "encoders"),
    ("spread-unbounded", "spread"),
]
TOGETHER_CELLS = ("emojis-250", "icons-64", "photographs-64")
TOGETHER: list[Pair] = [("encoders-spread", "encoders"), ("one-space", "encoders")]
MEASURES = (
    PRIMARY,
    Measure("zero-shot top-1", ("zero-shot", "top-1")),
    CORRELATION,
    Measure("class, pictures R@1", ("within", "pictures R@1")),
    Measure("class, texts R@1", ("within", "texts R@1")),
    Measure("alignment", ("geometry", "alignment")),
    Measure("uniformity, pictures", ("geometry", "pictures' uniformity")),
    Measure("uniformity, texts", ("geometry", "texts' uniformity")),
    Measure("modality gap", ("geometry", "modality_gap")),
    Measure("scale", ("geometry", "logit_scale"), 1),
)
FIXED = "-fixed"  # at the end of the arms whose scale is not learned
UNBOUNDED = "-unbounded"  # at the end of the arms whose scale has no ceiling
LOWER = "clip-lower"  # CLIP's loss, tuned at lower rates beside all tries of clip
Tried = dict[Setting, float]  # R@10 on the dev side, the mean over the tuning seeds


@dataclasses.dataclass(frozen=True)
class Cell:
    """A data set with a batch and epochs.

    Attributes:
        name: In the plan.
        find: The data set's records.
        tuned: The cell whose dev side chooses the settings.
        epochs: Of the test side.
    """

    name: str
    find: Find
    tuned: Mapping[str, Any]
    epochs: int
    sizes: SimpleNamespace
    tuning_find: Find

    def dev(self, arm: str, lr: float, value: float) -> Setting:
        """Return a try, with the first of the tuning seeds."""
        of = self.tuned
        epochs = getattr(self.sizes, "epochs", of["epochs"])
        return Setting(arm, of["tuning_seeds"][0], "dev", of["batch_size"], epochs, lr, value)

    def scores(self, tries: Sequence[Setting]) -> Tried:
        """Return the tries with their scores.

        Raises:
            MissingError: If one has no record.
        """
        scores = self.tuning_find.means(PRIMARY, self.tuned["tuning_seeds"])
        return dict(zip(tries, scores(tries), strict=True))

    def rates(self, arm: str) -> list[Setting]:
        """Return an arm's first tries: its first number at every rate."""
        name, value = self.sizes.tries[arm][0]
        rates = self.sizes.lower_rates if arm == LOWER else self.sizes.rates
        return [self.dev(name, lr, value) for lr in rates]

    def numbers(self, arm: str, rates: Tried) -> list[Setting]:
        """Return an arm's further tries: its other numbers at the best rate."""
        best = max(rates, key=rates.__getitem__)
        return [self.dev(name, best.lr, value) for name, value in self.sizes.tries[arm][1:]]

    def tried(self, arm: str) -> Tried:
        """Return all tries of an arm.

        Raises:
            MissingError: If one has no record.
        """
        rates = self.scores(self.rates(arm))
        tried = {**rates, **self.scores(self.numbers(arm, rates))}
        return {**self.tried("clip"), **tried} if arm == LOWER else tried

    def chosen(self, arm: str) -> Setting:
        """Return the arm's best try; of an arm of another scale that of the arm with the learned one.

        A fixed scale is that of CLIP's best try at its end.
        """
        if arm in self.sizes.tries:
            tried = self.tried(arm)
            return max(tried, key=tried.__getitem__)
        if arm.endswith(UNBOUNDED):
            return dataclasses.replace(self.chosen(arm.removesuffix(UNBOUNDED)), arm=arm)
        clip = self.chosen("clip")
        scale = self.tuning_find([clip])[clip]["metrics"]["geometry"]["logit_scale"]
        return dataclasses.replace(self.chosen(arm.removesuffix(FIXED)), arm=arm, value=round(scale, 1))

    def test(self, arm: str, seed: int, split: int = 0) -> Setting:
        """Return a training of the test side, as the dev side chose it."""
        return dataclasses.replace(self.chosen(arm), seed=seed, side="test", epochs=self.epochs, split=split)


def cell(sizes: SimpleNamespace, name: str, finds: Mapping[str, Find]) -> Cell:
    """Return a cell of the plan."""
    of = sizes.cells[name]
    tuned = sizes.cells[of.get("settings_of", name)]
    epochs = getattr(sizes, "epochs", of["epochs"])
    return Cell(name, finds[of["data"]], tuned, epochs, sizes, finds[tuned["data"]])


def cells(sizes: SimpleNamespace, names: Sequence[str], finds: Mapping[str, Find]) -> Iterator[Cell]:
    """Yield those of the cells whose data sets are there."""
    for name in names:
        of = sizes.cells[name]
        needed = {of["data"], sizes.cells[of.get("settings_of", name)]["data"]}
        if needed <= finds.keys():
            yield cell(sizes, name, finds)


def ask_forms(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for the tries of the spread's forms.

    Raises:
        MissingError: If a training has no record; the first.
    """
    forms = sizes.forms
    for seeds in (forms["seeds"][:1], forms["seeds"][1:]):
        for one in cells(sizes, forms["cells"], finds):
            one.tuning_find(
                dataclasses.replace(one.dev(arm, forms["rate"], value), seed=seed)
                for seed in seeds
                for arm, value in forms["tried"]
            )


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all trainings in their order; data sets that are not there are passed over.

    Raises:
        MissingError: If a training has no record; the first.
    """
    ask_forms(sizes, finds)
    for block in sizes.blocks:
        tuned = [arm for arm in block["arms"] if arm in sizes.tries]
        for one in cells(sizes, block["cells"], finds):
            one.scores([setting for arm in tuned for setting in one.rates(arm)])
            numbers = (one.numbers(arm, one.scores(one.rates(arm))) for arm in tuned)
            one.scores([setting for of in numbers for setting in of])
            settings = {arm: one.test(arm, 0, block.get("split", 0)) for arm in block["arms"]}
            one.find(
                dataclasses.replace(of, seed=seed) for seed in block["seeds"] for of in settings.values()
            )


@dataclasses.dataclass(frozen=True)
class Chosen(Tested):
    """A cell, which may be the icons' second thousand, and what its dev side chose.

    Attributes:
        settings: Of the arms that are tuned.
        tried: All tries of these arms.
    """

    settings: Mapping[str, Setting]
    tried: Mapping[str, Tried]


def is_whole(one: Cell, block: Mapping[str, Any]) -> bool:
    """True if all of a block's trainings in a cell have records; a repeat of the first seeds is read then."""
    try:
        settings = [one.test(arm, 0, block.get("split", 0)) for arm in block["arms"]]
    except MissingError:
        return False
    wanted = [dataclasses.replace(of, seed=seed) for of in settings for seed in block["seeds"]]
    return len(one.find.there(wanted)) == len(wanted)


def by_cell(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> Iterator[Chosen]:
    """Yield the records of every cell's test side: of split 0, then of the others."""
    for split in sorted({block.get("split", 0) for block in sizes.blocks}):
        yield from by_cell_of_split(sizes, finds, split)


def by_cell_of_split(sizes: SimpleNamespace, finds: Mapping[str, Find], split: int) -> Iterator[Chosen]:
    """Yield the records of every cell's test side on a split; the tries with those of split 0."""
    for one in cells(sizes, list(sizes.cells), finds):
        name = f"{one.name}, split {split}" if split else one.name
        blocks = [of for of in sizes.blocks if one.name in of["cells"] and of.get("split", 0) == split]
        read = [of for of in blocks if of["seeds"] == sizes.blocks[0]["seeds"] or is_whole(one, of)]
        tried: dict[str, Tried] = {}
        settings: dict[str, Setting] = {}
        records: dict[str, dict[int, Record]] = {}
        for arm in dict.fromkeys(arm for of in blocks for arm in of["arms"]):
            try:
                settings[arm] = one.test(arm, 0, split)
            except MissingError:
                continue
            if arm in sizes.tries and not split:
                tried[arm] = one.tried(arm)
            seeds = {seed for of in read if arm in of["arms"] for seed in of["seeds"]}
            wanted = [dataclasses.replace(settings[arm], seed=seed) for seed in sorted(seeds)]
            if found := {setting.seed: record for setting, record in one.find.there(wanted).items()}:
                records[arm] = found
        if not records:
            continue
        yield Chosen(name, Arms(records), settings, tried)
        second = {
            arm: {seed: {**record, "metrics": record["metrics"][SECOND]} for seed, record in of.items()}
            for arm, of in records.items()
            if all(SECOND in record["metrics"] for record in of.values())
        }
        if second:
            yield Chosen(f"{name}, second", Arms(second), settings, {})


def together(every: Sequence[Tested]) -> list[list[str]]:
    """Return the rows of the tests over the sets together: a seed's value is the mean over the cells.

    Pairs without a record in one of the cells are left out.
    """
    every_arms = [of.arms for of in every if of.cell in TOGETHER_CELLS]
    if len(every_arms) < len(TOGETHER_CELLS):
        return []

    def means(arm: str) -> dict[int, float]:
        values = [of.values(arm, PRIMARY) for of in every_arms]
        return {seed: fmean(of[seed] for of in values) for seed in set.intersection(*map(set, values))}

    there = [pair for pair in TOGETHER if all(set(pair) <= of.records.keys() for of in every_arms)]
    found = {pair: paired_difference(*map(means, pair)) for pair in there}
    tested = correct({pair: difference for pair, difference in found.items() if difference is not None})
    return [[*(f"`{arm}`" for arm in pair), str(of.n), *test_cells(of)] for pair, of in tested.items()]


def is_tuned_lower(of: Chosen) -> bool:
    """True if CLIP's best rate is one of those that only ``clip-lower`` has."""
    return LOWER in of.settings and of.settings[LOWER] != of.settings["clip"]


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the records that are there."""
    every = list(by_cell(sizes, finds))
    against_clip = [(arm, "clip") for arm in sizes.tries if arm != "clip"]  # one family, spread's gain in it
    others = [pair for pair in against_clip if pair not in PRIMARY_TESTS.values()]
    against_lower = [(arm, LOWER) for arm in sizes.tries if arm not in ("clip", LOWER)]
    return {
        "records": sum(len(find.records) for find in finds.values()),
        **primary_values(every, PRIMARY_TESTS, against_clip),
        "secondary": [
            *(
                row
                for pairs in (*([pair] for pair in SECONDARY), others)
                for row in rows(every, pairs, against_clip)
            ),
            *rows([of for of in every if is_tuned_lower(of)], against_lower),
        ],
        "together": together(every),
        "together_cells": ", ".join(TOGETHER_CELLS),
        "arms_head": ["cell", "arm", *(of.title for of in MEASURES)],
        "arms": mean_rows(every, MEASURES),
        "tries": [
            [of.cell, f"`{arm}`", _text(max(tried, key=tried.__getitem__)), _texts(tried)]
            for of in every
            for arm, tried in of.tried.items()
            if "settings_of" not in sizes.cells[of.cell]
        ],
        "form": sizes.tries["spread"][0][0],
        "form_rate": f"{sizes.forms['rate']:g}",
        "forms_head": ["form", "weight", *sizes.forms["cells"], "mean"],
        "forms": form_rows(sizes, finds),
        "blocks": [_progress(sizes, finds, block) for block in sizes.blocks],
        "made": conditions_texts(record for find in finds.values() for record in find.records.values()),
    }


def form_scores(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[tuple[str, float], list[float]]:
    """Return the dev sides' R@10 of the forms by cell, of those that are tried in every cell."""
    forms = sizes.forms
    found: dict[tuple[str, float], list[float]] = {}
    for arm, value in forms["tried"]:
        try:
            found[arm, value] = [
                fmean(one.tuning_find.scores(PRIMARY)([
                    dataclasses.replace(one.dev(arm, forms["rate"], value), seed=seed)
                    for seed in forms["seeds"]
                ]))
                for one in cells(sizes, forms["cells"], finds)
            ]  # fmt: skip
        except MissingError:
            continue
    return found


def form_rows(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> list[list[str]]:
    """Return the rows of the forms' table."""
    return [
        [f"`{arm}`", f"{value:g}", *(f"{score:.1f}" for score in scores), f"{fmean(scores):.2f}"]
        for (arm, value), scores in form_scores(sizes, finds).items()
    ]


def _text(setting: Setting) -> str:
    return f"{setting.arm} {setting.value:g} at {setting.lr:g}"


def _texts(tried: Tried) -> str:
    return "; ".join(f"{_text(one)}: {score:.1f}" for one, score in tried.items())


def _progress(sizes: SimpleNamespace, finds: Mapping[str, Find], block: Mapping[str, Any]) -> list[str]:
    """Return a block's cells, arms and seeds, and how many of its test trainings are there."""
    split, there = block.get("split", 0), 0
    for one in cells(sizes, block["cells"], finds):
        for arm in block["arms"]:
            try:
                setting = one.test(arm, 0, split)
            except MissingError:
                continue
            there += len(one.find.there(dataclasses.replace(setting, seed=seed) for seed in block["seeds"]))
    planned = len(block["cells"]) * len(block["arms"]) * len(block["seeds"])
    seeds = f"{min(block['seeds'])} to {max(block['seeds'])}"
    where = f", split {split}" if split else ""
    return [
        ", ".join(block["cells"]) + where,
        ", ".join(f"`{arm}`" for arm in block["arms"]),
        seeds,
        f"{there} of {planned}",
    ]


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=_HERE,
        setting=Setting,
        plan="plan.yaml",
        records={name: name for name in SETS},
        data=data,
        results=results,
        report="spread",
        ask=ask,
        packages=("torch", "numpy", "scipy", "scikit-learn", "rankloss"),
    )
