"""The study: the order of its trainings, the tests of its plan, and the report's values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from studies.cells import BY_TIES, Tested, mean_rows, primary_values, rows
from studies.data.sets import SECOND
from studies.plan import Find, MissingError
from studies.records import Record
from studies.report import conditions_texts, signed
from studies.runner import Study
from studies.statistics import Arms, Measure, Pair
from studies.students.measure import CORRELATION, PRIMARY, hits_of_pictures

from . import heads, pretrained
from .data import data
from .setting import Setting

SETS = (
    "emojis",
    "icons",
    "icons-2000",
    "icons-35840",
    "icons-71680",
    "icons-141093",
    "photographs",
    "fxemoji",
    "noto-v1",
    "emojis after icons-30000",
    "fxemoji after icons-30000",
    "noto-v1 after icons-30000",
)
PRIMARY_TESTS: dict[str, Pair] = {
    "a": (heads.CCA, heads.HEADS),
    "b": (heads.BOTH, heads.CCA),
    "c": (heads.BOTH, heads.TWO_HEADS),
    "d": ("mimicry", "clip"),
    "e": ("mimicry", "encoders"),
    "f": ("mimicry", "mimicry-shuffled"),
    "g": ("mimicry-ranks", "mimicry"),
    "h": ("mimicry-spread", "mimicry"),
    "i": (pretrained.CLOSED, pretrained.TUNED),
}
OF_MIMICRY = (
    "ranks",
    "softmax",
    "mimicry-heads",
    "mimicry-components",
)  # arms minus mimicry: secondary tests
SEARCHED: list[Pair] = [(heads.CCA, heads.SEARCH), (heads.WITH_SEARCH, heads.CCA)]
MEASURES = (
    PRIMARY,
    Measure("zero-shot top-1", ("zero-shot", "top-1")),
    CORRELATION,
    Measure("alignment", ("geometry", "alignment")),
    Measure("modality gap", ("geometry", "modality_gap")),
    Measure("scale", ("geometry", "logit_scale"), 1),
)
SEEDLESS = (heads.CCA, heads.SEARCH, *pretrained.SEEDLESS)  # arms that draw no random number
HEADS = (heads.HEADS, pretrained.HEADS)
OF_PRETRAINED: list[Pair] = [
    (pretrained.JOINED, pretrained.TUNED),
    (pretrained.CLOSED, pretrained.HEADS),
    (pretrained.TUNED, pretrained.START),
]
UNTUNED = (heads.CCA, *pretrained.SEEDLESS)  # arms without tries
Tried = dict[Setting, float]  # R@10 on the dev side


@dataclasses.dataclass(frozen=True)
class Cell:
    """A data set, and what is trained on it: heads, or students with a batch and epochs.

    Attributes:
        name: In the plan.
        find: The data set's records.
        tuned: The cell whose dev side chooses the settings.
        epochs: Of students on the test side, where the settings are another cell's; None: as they were tried.
        sizes: The plan.
        tuning_find: The records of that cell's data set.
    """

    name: str
    find: Find
    tuned: Mapping[str, Any]
    epochs: int | None
    sizes: SimpleNamespace
    tuning_find: Find

    def start(self, arm: str) -> Setting:
        """Return the setting from which an arm's tries begin."""
        start = Setting(arm, self.sizes.tuning_seeds[0], "dev")
        if arm in pretrained.SHARES:
            return dataclasses.replace(start, arm=pretrained.KEPT, seed=0, value=pretrained.SHARES[arm])
        if arm in SEEDLESS:
            return dataclasses.replace(start, seed=0)
        if arm in HEADS:
            epochs, batch_size = self._schedule(0)
            return dataclasses.replace(
                start, epochs=epochs, batch_size=batch_size, dropout=self.sizes.first_dropout
            )
        name, value = self.sizes.tries[arm][0]
        epochs = getattr(self.sizes, "epochs", self.tuned["epochs"])
        return dataclasses.replace(
            start, arm=name, value=value, epochs=epochs, batch_size=self.tuned["batch_size"]
        )

    def stages(self, arm: str) -> list[list[dict[str, Any]]]:
        """Return the stages of an arm's tries: changes of the best so far."""
        if arm in UNTUNED:
            return []
        if arm == heads.SEARCH:
            return [[{"value": float(k)} for k in self.sizes.neighbours]]
        if arm in HEADS:
            return [[self._change(name, value) for value in of] for name, of in self.sizes.heads.items()]
        others = [{"arm": name, "value": value} for name, value in self.sizes.tries[arm][1:]]
        return [[{"lr": lr} for lr in self.sizes.rates], others]

    def _change(self, name: str, value: Any) -> dict[str, Any]:
        """Return a value of a plan's stage as a setting's entries; a schedule, by its number, is two."""
        if name == "schedule":
            epochs, batch_size = self._schedule(value)
            return {"epochs": epochs, "batch_size": batch_size}
        return {name: value}

    def _schedule(self, number: int) -> tuple[int, int]:
        """Return a schedule's epochs, or those of a small preset for all schedules, and its batch size."""
        epochs, batch_size = self.tuned["schedules"][number]
        return getattr(self.sizes, "epochs", epochs), batch_size

    def scores(self, tries: Sequence[Setting], seeds: Sequence[int]) -> Tried:
        """Return the tries with their mean scores over seeds.

        Raises:
            MissingError: If one has no record.
        """
        means = self.tuning_find.means(PRIMARY, seeds)
        return dict(zip(tries, means(tries), strict=True))

    def tried(self, arm: str) -> Tried:
        """Return all tries of an arm, of the first tuning seed.

        Raises:
            MissingError: If one has no record.
        """
        best, tried = self.start(arm), dict[Setting, float]()
        for changes in self.stages(arm):
            tries = [dataclasses.replace(best, **change) for change in changes]
            tried |= self.scores(tries, [best.seed])
            best = max(tried, key=tried.__getitem__)
        return tried

    def finalists(self, arm: str) -> Tried:
        """Return an arm's best tries with their means over all tuning seeds.

        Raises:
            MissingError: If one has no record.
        """
        tried = self.tried(arm)
        best = sorted(tried, key=tried.__getitem__, reverse=True)[: self.sizes.finalists]
        return self.scores(best, self.sizes.tuning_seeds)

    def chosen(self, arm: str) -> Setting:
        """Return the arm's best try.

        Raises:
            MissingError: If one has no record.
        """
        if arm in UNTUNED:
            return self.start(arm)
        of = self.tried(arm) if arm in SEEDLESS else self.finalists(arm)
        return max(of, key=of.__getitem__)

    def tests(self, arm: str, seeds: Sequence[int], split: int = 0) -> list[Setting]:
        """Return the trainings of the test side, as the dev side chose them.

        Raises:
            MissingError: If a try has no record.
        """
        test = dataclasses.replace(self.chosen(arm), side="test", split=split)
        if self.epochs is not None:
            test = dataclasses.replace(test, epochs=self.epochs)
        return [test] if arm in SEEDLESS else [dataclasses.replace(test, seed=seed) for seed in seeds]


def cells(sizes: SimpleNamespace, names: Sequence[str], finds: Mapping[str, Find]) -> Iterator[Cell]:
    """Yield those of the cells whose data sets are there."""
    for name in names:
        of = sizes.cells[name]
        tuned = sizes.cells[of.get("settings_of", name)]
        if {of["data"], tuned["data"]} <= finds.keys():
            epochs = getattr(sizes, "epochs", of.get("epochs")) if tuned is not of else None
            yield Cell(name, finds[of["data"]], tuned, epochs, sizes, finds[tuned["data"]])


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all trainings in their order; data sets that are not there are passed over.

    Raises:
        MissingError: If a training has no record; the first.
    """
    for block in sizes.blocks:
        for one in cells(sizes, block["cells"], finds):
            wanted = [one.tests(arm, block["seeds"], block.get("split", 0)) for arm in block["arms"]]
            one.find(sorted((each for of in wanted for each in of), key=lambda setting: setting.seed))


@dataclasses.dataclass(frozen=True)
class Chosen(Tested):
    """A cell, which may be the icons' second thousand, and what its dev side chose.

    Attributes:
        tried: All tries of the arms, by arm.
        finalists: The best of them with all tuning seeds.
    """

    tried: Mapping[str, Tried]
    finalists: Mapping[str, Tried]


def by_cell(sizes: SimpleNamespace, finds: Mapping[str, Find], split: int = 0) -> Iterator[Chosen]:
    """Yield the records of every cell's test side of a split, of the seeds that are there."""
    for one in cells(sizes, list(sizes.cells), finds):
        blocks = [of for of in sizes.blocks if one.name in of["cells"] and of.get("split", 0) == split]
        records: dict[str, dict[int, Record]] = {}
        tried: dict[str, Tried] = {}
        finalists: dict[str, Tried] = {}
        for arm, seeds in ((arm, of["seeds"]) for of in blocks for arm in of["arms"]):
            try:
                there = one.find.there(one.tests(arm, seeds, split))
                tried[arm] = one.tried(arm)
                finalists[arm] = {} if arm in SEEDLESS else one.finalists(arm)
            except MissingError:
                continue
            records.setdefault(arm, {}).update({setting.seed: record for setting, record in there.items()})
        if found := with_joined({arm: of for arm, of in records.items() if of}):
            yield Chosen(one.name, Arms(found), tried, finalists)
            for name in (SECOND, pretrained.OLD):
                if of_name := inner(found, name):
                    yield Chosen(f"{one.name}, {name}", Arms(of_name), {}, {})


def with_joined(records: Mapping[str, Mapping[int, Record]]) -> dict[str, dict[int, Record]]:
    """Return the records by arm and seed, with those of the models side by side that they hold.

    An arm that draws no random number has its one record with every seed of the heads.
    """
    seeds = next(([*records[arm]] for arm in (heads.HEADS, pretrained.TUNED) if arm in records), [0])
    found = {}
    for arm, of in records.items():
        by_seed = dict.fromkeys(seeds, next(iter(of.values()))) if arm in SEEDLESS else dict(of)
        found[arm] = by_seed
        for name in heads.JOINED.get(arm, ()):
            found[name] = {
                seed: {**record, "metrics": record["metrics"]["joined"][name]}
                for seed, record in by_seed.items()
            }
    return found


def inner(records: Mapping[str, Mapping[int, Record]], name: str) -> dict[str, dict[int, Record]]:
    """Return the records of a further side, of those arms whose records have it."""
    return {
        arm: {seed: {**record, "metrics": record["metrics"][name]} for seed, record in of.items()}
        for arm, of in records.items()
        if all(name in record["metrics"] for record in of.values())
    }


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the records that are there."""
    every = list(by_cell(sizes, finds))
    families = [SEARCHED[:1], SEARCHED[1:]]
    families.append([(arm, "clip") for arm in sizes.tries if arm != "clip"])
    families.append([(arm, "mimicry") for arm in OF_MIMICRY])
    families += [[pair] for pair in OF_PRETRAINED]
    return {
        "records": sum(len(find.records) for find in finds.values()),
        **primary_values(every, PRIMARY_TESTS),
        "secondary": [row for pairs in families for row in rows(every, pairs)],
        "splits": split_rows(sizes, finds),
        "arms_head": ["cell", "arm", *(of.title for of in MEASURES)],
        "arms": mean_rows(every, MEASURES),
        "kept_head": ["cell", "share", *KEPT_MEASURES],
        "kept": [row for of in every for row in kept_rows(of)],
        "closed": [row for of in every for row in closed_rows(of)],
        "tries": [
            [of.cell, f"`{arm}`", _texts(of.finalists.get(arm, {})), _texts(tried)]
            for of in every
            for arm, tried in of.tried.items()
            if tried and "settings_of" not in sizes.cells[of.cell]
        ],
        "blocks": [_progress(sizes, finds, block) for block in sizes.blocks],
        "made": conditions_texts(record for find in finds.values() for record in find.records.values()),
    }


def split_rows(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> list[list[str]]:
    """Return the rows of the splits' table: means over seeds of the heads' arms, by cell and split."""
    found = []
    for split in sorted({block.get("split", 0) for block in sizes.blocks}):
        for of in by_cell(sizes, finds, split):
            if of.cell.startswith("heads-") and (
                split or any(of.cell in b["cells"] for b in sizes.blocks if "split" in b)
            ):
                found += [[of.cell, str(split), *row[1:]] for row in mean_rows([of], [PRIMARY])]
    return found


def kept_rows(of: Tested) -> list[list[str]]:
    """Return the rows of the shares of a CLIP's own similarity: its scores, and the differences from them."""
    records = {
        share: next(iter(of.arms.records[arm].values()))
        for arm, share in pretrained.SHARES.items()
        if arm in of.arms.records
    }
    if of.cell.endswith(pretrained.OLD) or 1.0 not in records:
        return []
    scores = {share: [score(record) for score in KEPT_MEASURES.values()] for share, record in records.items()}
    first = scores.pop(1.0)
    rows = [[of.cell, "1", *(f"{mean:.1f}" for mean, _ in first)]]
    for share, found in scores.items():
        rows.append([of.cell, f"{share:g}", *map(_minus, found, first)])
    return rows


Scored = tuple[float, np.ndarray]  # a score, and each picture's


def _zero_shot(record: Record) -> Scored:
    """Return the zero-shot accuracy on pictures that have a class, and 100 or 0 of each."""
    found = record["metrics"]["zero-shot"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["hits"]), np.uint8))
    return found["top-1"], 100.0 * bits[: found["pictures"]]


def _recall(record: Record) -> Scored:
    """Return R@10 of new pairs, and of each picture."""
    return PRIMARY(record), hits_of_pictures(record)


def _recall_of_old(record: Record) -> Scored:
    """Return R@10 of the pairs that the CLIP was trained on before, and of each picture."""
    return _recall({"metrics": record["metrics"][pretrained.OLD]})


KEPT_MEASURES: dict[str, Callable[[Record], Scored]] = {
    "zero-shot top-1": _zero_shot,
    "R@10 of new pairs": _recall,
    "R@10 of old pairs": _recall_of_old,
}


def _minus(first: Scored, second: Scored) -> str:
    """Return a difference with its 95 % interval over pictures; a dash where ties in the hits forbid it."""
    difference, each = first[0] - second[0], first[1] - second[1]
    half = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    is_of_score = abs(each.mean() - difference) <= BY_TIES
    return f"{signed(difference, 1)} ± {f'{half:.1f}' if is_of_score else '–'}"


def closed_rows(of: Tested) -> Iterator[list[str]]:
    """Yield the rows of what the closed form's search chose, and the weights of models side by side."""
    for arm, records in of.arms.records.items():
        chosen = [record["metrics"]["chosen"] for record in records.values() if "chosen" in record["metrics"]]
        texts = {
            ", ".join(f"{name} {value:g}" for name, value in one.items() if name != "dev") for one in chosen
        }
        if texts:
            yield [of.cell, f"`{arm}`", "; ".join(sorted(texts))]


def _text(setting: Setting) -> str:
    """Return a try's settings that differ between the tries of its arm."""
    if setting.arm == heads.SEARCH:
        return f"k {setting.value:g}"
    if setting.arm in HEADS:
        schedule = f"{setting.epochs} epochs of {setting.batch_size}"
        rest = f"dropout {setting.dropout:g}, smoothing {setting.label_smoothing:g}"
        return f"lr {setting.lr:g}, {schedule}, {rest}"
    return f"{setting.arm} {setting.value:g} at {setting.lr:g}"


def _texts(tried: Tried) -> str:
    """Return tries with their scores as text."""
    return "; ".join(f"{_text(one)}: {score:.1f}" for one, score in tried.items())


def _progress(sizes: SimpleNamespace, finds: Mapping[str, Find], block: Mapping[str, Any]) -> list[str]:
    """Return a block's cells, arms and seeds, and how many of its test trainings are there."""
    split, there, planned = block.get("split", 0), 0, 0
    for name in block["cells"]:
        planned += sum(1 if arm in SEEDLESS else len(block["seeds"]) for arm in block["arms"])
        for one in cells(sizes, [name], finds):
            for arm in block["arms"]:
                try:
                    there += len(one.find.there(one.tests(arm, block["seeds"], split)))
                except MissingError:
                    continue
    where = f", split {split}" if split else ""
    return [
        ", ".join(block["cells"]) + where,
        ", ".join(f"`{arm}`" for arm in block["arms"]),
        f"{min(block['seeds'])} to {max(block['seeds'])}",
        f"{there} of {planned}",
    ]


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="plan.yaml",
        records={name: name.replace(" ", "-") for name in SETS},
        data=data,
        results=results,
        report="alignment",
        ask=ask,
    )
