"""The study: the order of its trainings, the tests of its plan, and the report's values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studies.plan import Find, MissingError
from studies.records import Record
from studies.report import conditions_texts, difference_text, ends_text, mark, mean_text, p_text, test_cells
from studies.runner import Study
from studies.statistics import Arms, Difference, Measure, Pair, correct, paired_difference
from studies.students.measure import CORRELATION, PRIMARY, hits_of_pictures

from .data import data
from .train import ARMS, Setting

CLIP, SMOOTHING, CAPTIONS, SHUFFLED = "clip", "smoothing", "captions", "shuffled"
TRIED = (SMOOTHING, "scale-5", "scale-50")  # at CLIP's best learning rate
GAINS = ("mimicry", "encoders", "rankclip", CAPTIONS, SHUFFLED, SMOOTHING, "memory")  # on curves
GOAL = 1.5  # points
SETS = ("emojis", "icons", "photographs")
LARGE = ("icons-71680", "icons-all")
MORE = ("icons-2000", "photographs-one")
ZERO_SHOT = Measure("zero-shot top-1", ("zero-shot", "top-1"))
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Cell:
    """A data set with a batch and epochs, with the choices on its dev side."""

    name: str
    find: Find
    rates: dict[float, float]  # R@10 by learning rate
    tried: dict[str, float]  # R@10 at the best of them, by arm
    base: Setting

    @property
    def reference(self) -> str:
        """The best of CLIP's loss, with smoothing, and with other scales at the start."""
        scores = {CLIP: max(self.rates.values()), **self.tried}
        return max(scores, key=scores.__getitem__)

    def setting(self, arm: str, seed: int, split: int = 0) -> Setting:
        """Return a training of the test side."""
        return dataclasses.replace(self.base, arm=arm, seed=seed, side="test", split=split)

    def there(self, arms: Sequence[str], seeds: Iterable[int], split: int = 0) -> Arms:
        """Return the records that are there, of the arms that have any."""
        found: dict[str, dict[int, Record]] = {}
        for arm in arms:
            wanted = (self.setting(arm, seed, split) for seed in seeds)
            if of := {one.seed: record for one, record in self.find.there(wanted).items()}:
                found[arm] = of
        return Arms(found)


def cell(sizes: SimpleNamespace, name: str, finds: Mapping[str, Find]) -> Cell:
    """Return a cell, whose choices are asked for.

    Raises:
        MissingError: If a try has no record.
    """
    own = {"epochs": getattr(sizes, "epochs", sizes.cells[name]["epochs"])}
    tuned = sizes.cells[sizes.cells[name].get("rate_of", name)]
    scores = finds[tuned["data"]].scores(PRIMARY)
    epochs = getattr(sizes, "epochs", tuned["epochs"])
    start = Setting(CLIP, sizes.tuning_seed, "dev", tuned["batch_size"], epochs, 0.0)
    levels = tuned.get("tries", sizes.tries)
    tries = [dataclasses.replace(start, lr=lr) for lr in levels]
    rates = dict(zip(levels, scores(tries), strict=True))
    best = dataclasses.replace(start, lr=max(rates, key=rates.__getitem__))
    tried = dict(zip(TRIED, scores([dataclasses.replace(best, arm=arm) for arm in TRIED]), strict=True))
    find = finds[sizes.cells[name]["data"]]
    return Cell(name, find, rates, tried, dataclasses.replace(best, **own))


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all trainings in their order; data sets that are not there are passed over.

    Raises:
        MissingError: If a training has no record; the first.
    """
    for block in sizes.blocks:
        cells = [cell(sizes, name, finds) for name in block["cells"] if sizes.cells[name]["data"] in finds]
        for seed in block["seeds"]:
            for one in cells:
                one.find(one.setting(arm, seed, block.get("split", 0)) for arm in block["arms"])


def by_cell(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> Iterator[tuple[Cell, Arms]]:
    """Yield the cells whose choices are made, with the records of their test sides."""
    for name, of in sizes.cells.items():
        if of["data"] not in finds:
            continue
        try:
            one = cell(sizes, name, finds)
        except MissingError:
            continue
        arms = one.there([*ARMS], _seeds(sizes, name))
        if arms.records:
            yield one, arms


def _seeds(sizes: SimpleNamespace, name: str) -> list[int]:
    return sorted({seed for block in sizes.blocks if name in block["cells"] for seed in block["seeds"]})


def compared(cells: Sequence[tuple[Cell, Arms]], pairs: Sequence[Pair]) -> dict[tuple[str, Pair], Difference]:
    """Return the differences of all cells that have both arms, corrected together."""
    found = {}
    for one, arms in cells:
        for pair in pairs:
            named = tuple(one.reference if arm is None else arm for arm in pair)
            if set(named) <= set(arms.records) and (d := arms.difference(named, PRIMARY)) is not None:
                found[one.name, named] = d
    return correct(found)


def changes(
    curves: Mapping[str, Mapping[str, str]], arms_of: Mapping[str, Arms]
) -> dict[tuple[str, ...], Difference]:
    """Return an arm's gain at the last cell of a curve that has it minus that at the first, paired by seed.

    Keys are a curve, an arm, and the two cells.
    """
    found = {}
    for curve, cells in curves.items():
        for arm in GAINS:
            there = [name for name in cells if name in arms_of and {arm, CLIP} <= set(arms_of[name].records)]
            if len(there) > 1:
                first, last = (_gains(arms_of[name], arm) for name in (there[0], there[-1]))
                if (change := paired_difference(last, first)) is not None:
                    found[curve, arm, there[0], there[-1]] = change
    return correct(found)


def _gains(arms: Arms, arm: str) -> dict[int, float]:
    mine, clips = (arms.values(one, PRIMARY) for one in (arm, CLIP))
    return {seed: mine[seed] - clips[seed] for seed in mine if seed in clips}


def over_splits(
    sizes: SimpleNamespace, cells: Sequence[Cell]
) -> dict[tuple[str, str], tuple[dict[int, Difference], Difference]]:
    """Return an arm's gains over CLIP by split, and the test of their means over the splits."""
    gains: dict[tuple[str, str], dict[int, Difference]] = {}
    for one in cells:
        if one.name in sizes.splits["cells"]:
            for split in sizes.splits["numbers"]:
                arms = one.there(sizes.splits["arms"], sizes.splits["seeds"], split)
                for arm in arms.records:
                    if arm != CLIP and CLIP in arms.records:
                        gains.setdefault((one.name, arm), {})[split] = arms.difference((arm, CLIP), PRIMARY)
    tests = correct(
        {key: paired_difference({split: d.mean for split, d in of.items()}, dict.fromkeys(of, 0.0))
         for key, of in gains.items() if len(of) == len(sizes.splits["numbers"])}
    )  # fmt: skip
    return {key: (gains[key], test) for key, test in tests.items()}


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the records that are there."""
    every = list(by_cell(sizes, finds))
    arms_of = {one.name: arms for one, arms in every}
    cells, large = (
        [of for of in every if (sizes.cells[of[0].name]["data"] in LARGE) is is_large]
        for is_large in (False, True)
    )
    batches = sorted({of["batch_size"] for of in sizes.cells.values()})
    goal = {size: [f"{of}-{size}" for of in SETS] for size in batches}
    planned = [of for of in cells if of[0].name in {name for names in goal.values() for name in names}]
    primary = compared(planned, [(CAPTIONS, None)])
    control = compared(planned, [(CAPTIONS, SHUFFLED)])
    others = [arm for arm in ARMS if arm not in (CLIP, CAPTIONS)]
    rivals = [(CAPTIONS, CLIP), *((CAPTIONS, arm) for arm in ("encoders", "sentence"))]
    tested = [of for of in cells if "described" not in sizes.cells[of[0].name]]
    secondary = compared(tested, [*((arm, CLIP) for arm in others), *rivals])
    of_large = [(CAPTIONS, CLIP), (CAPTIONS, SHUFFLED), (SHUFFLED, CLIP), ("memory", CLIP), (SMOOTHING, CLIP)]
    pairs = compared(large, of_large)
    tests = {**primary, **control, **secondary, **pairs}
    ends = {key: arms_of[key[0]].over_pictures(key[1], hits_of_pictures) for key in tests}

    def row(key: tuple[str, Pair], d: Difference) -> list[str]:
        arms = [f"`{arm}`" for arm in key[1]]
        tested = [difference_text(d), str(d.n), p_text(d.adjusted), mark(d)]
        return [key[0], *arms, *tested, ends_text(ends[key])]

    gains = {name: d for (name, _), d in primary.items()}
    held = {name for (name, _), d in control.items() if d.established and d.mean > 0}
    met = {name for name, d in gains.items() if d.established and d.mean >= GOAL and name in held}
    above = {name for name, d in gains.items() if d.established and d.mean > 0}
    extra = (ZERO_SHOT, CORRELATION)
    levels = sorted({lr for one, _ in every for lr in one.rates})

    def number(arms: Arms, arm: str, measure: Measure) -> str:
        has = [record for record in arms.records[arm].values() if measure.path[0] in record["metrics"]]
        return mean_text(arms.estimate(arm, measure)) if has else "–"

    def gain(arms: Arms, arm: str) -> str:
        return difference_text(arms.difference((arm, CLIP), PRIMARY) if arm in arms.records else None)

    return {
        "goal": GOAL,
        "tests_head": ["cell", "arm", "minus", "R@10", "n", "p", "", "seeds and pictures"],
        "records": sum(len(find.records) for find in finds.values()),
        "verdicts": {
            size: {
                "met": met.issuperset(names),
                "missed": [name for name in names if name in gains and name not in met],
                "absent": [name for name in names if name not in gains],
            }
            for size, names in goal.items()
        },
        "captions_own": [name for name in gains if name in above and name in held],
        "not_captions": [name for name in gains if name in above and name not in held],
        "not_shown": [name for name in gains if name not in above],
        "on_data": [key[0] for key in primary if (of := ends[key]) is not None and of[0] > 0],
        "primary": [row(key, d) for key, d in primary.items()],
        "control": [row(key, d) for key, d in control.items()],
        "secondary": [row(key, d) for key, d in secondary.items()],
        "large": [row(key, d) for key, d in pairs.items()],
        "gains_head": ["curve", "", "cell", "epochs", "CLIP's R@10", *GAINS],
        "gains": [
            [
                curve,
                label,
                name,
                str(sizes.cells[name]["epochs"]),
                number(arms_of[name], CLIP, PRIMARY),
                *(gain(arms_of[name], arm) for arm in GAINS),
            ]
            for curve, labels in sizes.curves.items()
            for name, label in labels.items()
            if name in arms_of
        ],
        "changes": [
            [
                curve,
                f"`{arm}`",
                f"{last} minus {first}",
                difference_text(d),
                str(d.n),
                p_text(d.adjusted),
                mark(d),
            ]
            for (curve, arm, first, last), d in changes(sizes.curves, arms_of).items()
        ],
        "splits_head": ["cell", "arm", *(f"split {one}" for one in sizes.splits["numbers"]), "mean", "p", ""],
        "splits": [
            [name, f"`{arm}`", *map(difference_text, of.values()), *test_cells(test)]
            for (name, arm), (of, test) in over_splits(sizes, [one for one, _ in every]).items()
        ],
        "arms": [
            [one.name, f"`{arm}`", *(number(arms, arm, measure) for measure in (PRIMARY, *extra))]
            for one, arms in every
            for arm in arms.records
        ],
        "tries": [
            [
                one.name,
                *(f"{one.rates[lr]:.1f}" if lr in one.rates else "–" for lr in levels),
                *(f"{one.tried[arm]:.1f}" for arm in TRIED),
                f"`{one.reference}`",
            ]
            for one, _ in every
            if "rate_of" not in sizes.cells[one.name]
        ],
        "tries_head": ["cell", *(f"{lr:g}" for lr in levels), *TRIED, "reference"],
        "made": conditions_texts(record for _, arms in every for record in arms.all),
    }


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=_HERE,
        setting=Setting,
        plan="plan.yaml",
        records={name: name for name in (*SETS, *LARGE, *MORE)},
        data=data,
        results=results,
        report="captions",
        ask=ask,
        packages=("torch", "numpy", "scipy", "scikit-learn", "rankloss"),
    )
